"""The kernels in C++ (`csrc/`), and how they are compiled, loaded and called (`library.py`). What they compute for the
model is said in `ops/`."""
