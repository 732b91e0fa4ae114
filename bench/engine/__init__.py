"""What the shard's engine reaches on this machine, as ratios: `python -m bench.engine`, or `make bench`."""
