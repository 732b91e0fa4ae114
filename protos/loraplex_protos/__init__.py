"""The language that the processes speak: the public API, the shard protocol, and their errors."""
