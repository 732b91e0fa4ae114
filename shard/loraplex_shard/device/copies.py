"""Copies to and from the device, for which the thread that asks for them does not wait. On the CPU there is nothing to
copy or to wait for."""

import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from numpy.typing import NDArray

from loraplex_shard.device.memory import view_at

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
            view_at(memory, begin, tensor.dtype, tensor.shape) for begin, tensor in zip(begins, given, strict=False)
        ]

    # A GPU reads pinned memory by itself. torch keeps it from being used again before that.
    host = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for view, tensor in zip(views(host), given, strict=True):
        view.copy_(tensor)
    return views(host.to(device, non_blocking=True))


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host, once a Mark that is made after this call has been waited for. A tensor of the CPU is
    returned as it is."""
    return tensor.to("cpu", non_blocking=True)


class Mark:
    """A place in the order of what a device was asked for by this thread. On the CPU, all before it is done."""

    def __init__(self, device: torch.device) -> None:
        self._made = time.monotonic()
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record()

    def wait(self) -> float:
        """Waits on the calling thread until all that comes before is done. Returns when it was done, by
        time.monotonic, as far as the host knows. Raises an error of the device."""
        if self._event is None:
            return self._made
        self._event.synchronize()
        return time.monotonic()
