"""Lists of work for the programs of a kernel, whose lengths are numbers on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_shard.device.copies import to_device


@dataclass(frozen=True, slots=True)
class Worklist:
    """The first `count` entries are work. A grid covers all entries, and programs beyond the count do nothing, so that
    a recorded launch serves any list that fits into the same memory."""

    numbers: torch.Tensor  # all of it, int32 or int64
    entries: torch.Tensor  # [room, numbers of an entry]
    count: torch.Tensor  # [1]

    @property
    def room(self) -> int:
        return len(self.entries)

    @classmethod
    def of(cls, entries: NDArray[Any], device: torch.device) -> "Worklist":
        """A list that has room for these entries [n, numbers] and no more. It is copied at once."""
        return worklists([(entries, len(entries))], device)[0]

    def copy(self) -> "Worklist":
        return _in(self.numbers.clone(), self.entries.shape[1])


def worklists(lists: Sequence[tuple[NDArray[Any], int]], device: torch.device) -> list[Worklist]:
    """Lists of entries [n, numbers], each with its room, in one copy."""
    memories = []
    for entries, room in lists:
        numbers = np.zeros(room * entries.shape[1] + 1, entries.dtype)
        numbers[: entries.size], numbers[-1] = entries.reshape(-1), len(entries)
        memories.append(numbers)
    copied = to_device(memories, device)
    return [_in(numbers, entries.shape[1]) for numbers, (entries, _) in zip(copied, lists, strict=True)]


def _in(numbers: torch.Tensor, width: int) -> Worklist:
    return Worklist(numbers, numbers[:-1].view(-1, width), numbers[-1:])


def numbered(counts: NDArray[Any]) -> NDArray[Any]:
    """The numbers from 0 to counts[i] - 1, for each i in turn."""
    numbers: NDArray[Any] = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return numbers


@cache
def multiprocessors(device: torch.device) -> int:
    """How many streaming multiprocessors a GPU has. Another device counts as one with 2."""
    return 2 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
