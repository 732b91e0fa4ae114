"""Metrics and traces of a rank."""
