"""Adapters by name: resolving references, staging adapters on the shards, and suggestions for unknown names."""
