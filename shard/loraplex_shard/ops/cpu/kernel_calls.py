"""Calls of kernels: they are made at once, or recorded in a program."""

from collections.abc import Callable, Sequence

import torch

from loraplex_shard.kernels.library import Kernels
from loraplex_shard.ops.cpu.program import Program


class KernelCalls:
    """What the operations call kernels with. While a program is recorded, calls are added to it instead of being made,
    and new tensors are the program's."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._threads = torch.get_num_threads()
        self._recording: Program | None = None

    def _record(self, compute: Callable[[], torch.Tensor]) -> Program:
        program = self._recording = Program(self._kernels)
        try:
            program.finish(compute())
        finally:
            self._recording = None
        return program

    def _call(self, kernel: str, **arguments: int | float | None) -> None:
        if self._recording is None:
            self._kernels.call(kernel, **arguments)
        else:
            self._recording.add(kernel, arguments)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if self._recording is None:
            return torch.empty(shape, dtype=dtype)
        return self._recording.empty(shape, dtype)


def address_of(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
