"""Adapters on a shard: their files are found and read (`sources`), interpreted by PEFT's rules (`peft`), converted to
the form that kernels read (`weights`), and held by digest (`store.py`)."""
