"""Adapters by name: what a reference stands for, how it is brought to the shards, and what else may have been meant."""
