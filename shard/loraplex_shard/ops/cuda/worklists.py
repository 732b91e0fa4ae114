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

    entries: torch.Tensor  # [room, numbers of an entry] int32 or int64
    count: torch.Tensor  # [1] int32

    @property
    def room(self) -> int:
        return len(self.entries)

    @classmethod
    def of(cls, entries: NDArray[Any], device: torch.device) -> "Worklist":
        """A list that has room for these entries [n, numbers] and no more. It is copied at once."""
        return worklists([entries], device)[0]


def worklists(lists: Sequence[NDArray[Any]], device: torch.device) -> list[Worklist]:
    """Lists of these entries [n, numbers], in one copy."""
    counts, *copied = to_device([np.array([len(entries) for entries in lists], np.int32), *lists], device)
    return [Worklist(entries, counts[number : number + 1]) for number, entries in enumerate(copied)]


def numbered(counts: NDArray[Any]) -> NDArray[Any]:
    """The numbers from 0 to counts[i] - 1, for each i in turn."""
    numbers: NDArray[Any] = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return numbers


@cache
def multiprocessors(device: torch.device) -> int:
    """How many streaming multiprocessors a GPU has. Another device counts as one with 2."""
    return 2 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
