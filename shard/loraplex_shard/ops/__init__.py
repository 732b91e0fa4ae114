"""The operations of the model: `base.py` says what they take, `reference.py` what they compute, in plain torch.
`cpu/` and `cuda/` are the fast ones, tested against it; `choose.py` picks by device."""
