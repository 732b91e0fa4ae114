"""Adapters by name: the registry, resolving references, staging adapters on the shards, and suggestions for unknown
names."""
