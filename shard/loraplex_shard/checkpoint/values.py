"""Checks that the tensors read from a checkpoint are numbers that a model can compute with."""

import math

import torch

from loraplex_shard.checkpoint.base import CheckpointError


def checked(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Returns the tensor. Raises CheckpointError if it holds integers, float8 without scales, NaN or infinity."""
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"tensor {name} holds {kind}, and config.json has no quantization_config that says what that stands for"
        )
    # The sum is quick and makes no copy, but it may be infinite for very large numbers.
    if not math.isfinite(tensor.sum(dtype=torch.float32)) and not bool(tensor.isfinite().all()):
        what = "NaN" if bool(tensor.isnan().any()) else "infinite numbers"
        raise CheckpointError(f"tensor {name} holds {what}: the file is damaged, or its training failed")
    return tensor
