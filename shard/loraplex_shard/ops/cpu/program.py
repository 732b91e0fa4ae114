"""Calls of kernels that were recorded once and run again and again, as long as only a step's own arrays change.

For a batch of few tokens, calling the kernels from Python takes as long as they do. A program is run by one call.
"""

import struct
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from weakref import finalize

import numpy as np
import torch

from loraplex_shard.kernels.library import Kernels

Argument = int | float | None


class StepNumber(int):
    """An argument that is another in every step: its value in this one, and its place among a step's numbers."""

    place: int

    def __new__(cls, value: int, place: int) -> "StepNumber":
        number = super().__new__(cls, value)
        number.place = place
        return number


class Program:
    """The calls of one forward pass, and the memory of its intermediate values and its result."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._width = 1 + kernels.most_parameters  # numbers of a call: which kernel, then its arguments
        self._calls: list[list[int]] = []
        self._changing: list[tuple[int, int]] = []  # place in the flattened calls, place among the step's numbers
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)  # by bytes
        self._memory: list[torch.Tensor] = []
        self._check: Callable[[int], None] | None = None
        self.result: torch.Tensor | None = None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor whose memory a later call of the program may have once nobody holds the tensor any more."""
        size = torch.Size(shape).numel() * dtype.itemsize
        free = self._free[size]
        if not free:
            free.append(torch.empty(size, dtype=torch.uint8))
            self._memory.append(free[-1])
        memory = free.pop()
        tensor = memory.view(dtype).view(torch.Size(shape))
        finalize(tensor, free.append, memory)
        return tensor

    def add(self, name: str, arguments: Mapping[str, Argument], check: Callable[[int], None] | None = None) -> None:
        """Adds a call of the kernel with this name.

        `check` is called with the kernel's result if that is not 0, and raises; no later call is made then. It is the
        same for all calls of a program that have one.
        """
        self._check = check or self._check
        number, ordered = self._kernels.row(name, arguments)
        row = [number]
        for argument in ordered:
            if isinstance(argument, StepNumber):
                self._changing.append((len(self._calls) * self._width + len(row), argument.place))
            row.append(_bits(argument))
        self._calls.append(row + [0] * (self._width - len(row)))

    def finish(self, result: torch.Tensor) -> None:
        """No more calls follow; `result` is what the program computes."""
        self.result = result
        self._numbers = np.array(self._calls, np.int64).reshape(-1)
        self._places, self._sources = np.array(self._changing, np.int64).reshape(-1, 2).T
        self._count = len(self._calls)

    def run(self, step: Sequence[int]) -> torch.Tensor:
        """Computes the result anew, in the same memory, from a step's numbers. Raises what a check raises."""
        assert self.result is not None
        self._numbers[self._places] = np.array(step, np.int64)[self._sources]
        if failure := self._kernels.call("run", calls=self._numbers.ctypes.data, count=self._count, width=self._width):
            assert self._check is not None
            self._check(failure)
        return self.result


def _bits(argument: Argument) -> int:
    if isinstance(argument, float):
        return int.from_bytes(struct.pack("<f", argument), "little")
    return int(argument or 0)
