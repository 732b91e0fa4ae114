"""The operations on the CPU: each is one call of a kernel (`operations.py`), or a place in a recorded list of calls
(`program.py`)."""
