"""The wire to the shards: the seam that the engine knows (`shards.py`), the group behind it over gRPC
(`shard_group.py`, `calls.py`), and both messages of a step (`codec.py`)."""
