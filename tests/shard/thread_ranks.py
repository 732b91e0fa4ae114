"""Ranks as threads of this process, which is enough tensor parallelism to test results."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import TypeVar

import torch

from loraplex_shard.device.parallel import Group

Result = TypeVar("Result")


class ThreadGroup(Group):
    """In each collective, every rank shows its tensor, waits for the others, and reads theirs."""

    def __init__(self, rank: int, size: int, barrier: Barrier, shown: list[torch.Tensor | None]) -> None:
        super().__init__(rank, size)
        self._barrier, self._shown = barrier, shown

    def all_reduce_(self, tensor: torch.Tensor) -> None:
        tensor.copy_(torch.stack(self._exchange(tensor)).sum(0))

    def gather(self, tensor: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        assert tensor.shape[1] == widths[self.rank]
        parts = self._exchange(tensor)
        return torch.cat(parts, dim=1) if self.rank == 0 else None

    def broadcast_(self, tensor: torch.Tensor) -> None:
        tensor.copy_(self._exchange(tensor)[0])

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._shown[self.rank] = tensor.clone()
        self._barrier.wait()
        shown = [part for part in self._shown if part is not None]
        self._barrier.wait()
        return shown


def run_on_ranks(size: int, function: Callable[[Group], Result]) -> list[Result]:
    """The function's results on each rank. Raises the first error that was not caused by another rank's."""
    barrier, shown = Barrier(size, timeout=60), [None] * size

    def run(rank: int) -> Result:
        try:
            return function(ThreadGroup(rank, size, barrier, shown))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(run, rank) for rank in range(size)]
    for future in futures:
        if not isinstance(future.exception(), BrokenBarrierError | None):
            raise future.exception()
    return [future.result() for future in futures]
