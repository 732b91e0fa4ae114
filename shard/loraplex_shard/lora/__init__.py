"""Adapters on a shard: their files are found and read (`sources`), understood as PEFT means them (`peft`), brought into
the form that kernels read (`weights`), and held by digest (`store.py`)."""
