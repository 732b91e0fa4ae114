"""The wire to the shards: the seam that the engine knows (`shards.py`), the replica behind it over gRPC
(`shard_group.py`, `calls.py`), and both messages of a step (`codec.py`)."""
