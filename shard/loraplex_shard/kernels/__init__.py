"""The kernels in C++ (`csrc/`), and how they are compiled, loaded and called (`library.py`). `ops/` says what they
compute for the model."""
