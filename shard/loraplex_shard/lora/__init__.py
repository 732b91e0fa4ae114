"""Adapters on a shard: where they come from (`sources.py` and what it lists), what PEFT's files mean (`peft.py` and
what it calls), the form that kernels read (`weights.py`), and which are held (`store.py`)."""
