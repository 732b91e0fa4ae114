"""Adapters by name: the registry, resolving references, staging adapters on the shards, what is said of those that
cannot be served, and suggestions for unknown names."""
