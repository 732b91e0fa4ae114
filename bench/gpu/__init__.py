"""Checks and measures the shard on one GPU, by one command: `make gpu-check`, or `python -m bench.gpu`.

Tiny, and in Triton's interpreter, it runs without a GPU (`--device cpu`). docs/measuring.md has what it needs and does.
"""
