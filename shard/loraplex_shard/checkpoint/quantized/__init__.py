"""Matrices that a checkpoint stores in few bits. There is a module for each method; `config.py` finds out which one a
checkpoint has, and `stored.py` has what they share."""
