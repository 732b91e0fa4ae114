"""How fast the shard's engine is on this machine, as ratios: `python -m bench.engine`, or `make bench`."""
