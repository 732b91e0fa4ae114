"""Matrices that a checkpoint stores in few bits: a module for each method, `config.py` finds out which, `stored.py` has
what they share."""
