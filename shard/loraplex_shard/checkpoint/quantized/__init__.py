"""Matrices that a checkpoint stores in few bits: by which method (`config.py`), in which tensors (`layouts.py`)."""
