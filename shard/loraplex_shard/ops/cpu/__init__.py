"""The operations in C++ (`csrc/`), compiled when they are first needed (`library.py`), called one by one
(`operations.py`) or as a recorded list (`program.py`); and collectives over shared memory."""
