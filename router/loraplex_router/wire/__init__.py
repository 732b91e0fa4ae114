"""The connection to the shards: the interface for the engine (`shards.py`), its implementation over gRPC
(`shard_group.py`, `calls.py`), both messages of a step (`codec.py`), and those about adapters (`adapter_codec.py`)."""
