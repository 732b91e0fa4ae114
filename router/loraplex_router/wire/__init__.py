"""The connection to the shards: the interface for the engine (`shards.py`), its implementation over gRPC
(`shard_group.py`, `calls.py`), and both messages of a step (`codec.py`)."""
