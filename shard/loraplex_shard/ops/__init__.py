"""The operations of the model: `base.py` says what they take, and `reference.py` what they compute, in plain torch.
`cpu/` and `cuda/` are the fast implementations, tested against the reference; `choose.py` picks one by device."""
