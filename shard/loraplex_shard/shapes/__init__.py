"""The shard's basic data types: a step's batch, the layouts of layers, attention heads, the KV cache, an adapter's
weights. They are data only."""
