"""Kernel calls that are recorded once and repeated for every step. Only the step's own numbers change between steps.

For a batch of few tokens, calling the kernels from Python takes as long as the kernels do. A program is one call.
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
    """An argument that changes with every step: its value in this step, and its index in a step's numbers."""

    place: int

    def __new__(cls, value: int, place: int) -> "StepNumber":
        number = super().__new__(cls, value)
        number.place = place
        return number


class Program:
    """The kernel calls of one forward pass, and the memory for its intermediate values and its result."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._width = 1 + kernels.most_parameters  # numbers per call: the kernel's number, then its arguments
        self._calls: list[list[int]] = []
        self._changing: list[tuple[int, int]] = []  # index in the flattened calls, index in a step's numbers
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)  # by size in bytes
        self._memory: list[torch.Tensor] = []
        self._check: Callable[[int], None] | None = None
        self.result: torch.Tensor | None = None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Returns a new tensor. Once nobody holds it any more, a later call of the program may reuse its memory."""
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
        """Adds a call of the kernel `name`.

        If the kernel's result is not 0, the program stops and calls `check` with the result; `check` raises. All calls
        of a program that have a check must have the same one.
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
        """Ends the recording. `result` is the tensor that the program computes."""
        self.result = result
        self._numbers = np.array(self._calls, np.int64).reshape(-1)
        self._places, self._sources = np.array(self._changing, np.int64).reshape(-1, 2).T
        self._count = len(self._calls)

    def run(self, step: Sequence[int]) -> torch.Tensor:
        """Computes the result again, in the same memory, with the numbers of this step. Raises what the check
        raises."""
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
