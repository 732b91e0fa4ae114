"""The operations on the CPU. Each operation is one call of a kernel (`operations.py`), or an entry in a recorded list
of calls (`program.py`)."""
