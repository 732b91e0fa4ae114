"""Adapters: which there are (registry), and which are on the device (pool)."""
