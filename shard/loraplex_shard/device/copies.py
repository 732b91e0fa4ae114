"""Copies to the device that nobody waits for. On the CPU there is nothing to copy, and the same calls are views."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from numpy.typing import NDArray

ALIGNMENT = 16  # bytes: kernels load that much at once


def to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """These arrays on the device, in one copy, for which the host does not wait. On the CPU, the tensors share the
    arrays' memory."""
    given = [torch.from_numpy(array) for array in arrays]
    if device.type == "cpu":
        return given
    begins = list(accumulate((-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in given), initial=0))

    def views(memory: torch.Tensor) -> list[torch.Tensor]:
        return [
            memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for begin, tensor in zip(begins, given, strict=False)
        ]

    # A GPU reads pinned memory by itself. torch keeps it from being used again before that.
    host = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for view, tensor in zip(views(host), given, strict=True):
        view.copy_(tensor)
    return views(host.to(device, non_blocking=True))
