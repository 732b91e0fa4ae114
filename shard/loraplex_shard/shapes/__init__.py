"""The shard's vocabulary: a step's batch, the layouts of layers, attention heads, the KV cache, an adapter's weights.
Data alone: imports nothing of the shard but its memory."""
