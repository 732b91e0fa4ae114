"""The operations on the CPU. Each operation is one call of a kernel (`operations.py`, `experts.py`), which is made at
once or recorded in a list of calls (`program.py`)."""
