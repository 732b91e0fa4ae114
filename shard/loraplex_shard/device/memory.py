"""Memory for what every step reads: large, and of huge pages where the kernel grants them; and for what it makes, which
is of the same sizes again and again. Knows nothing of its use.

Addresses are looked up page by page: with pages of 4 KiB, a processor that reads some hundred MB waits for look-ups as
well as for the bytes.
"""

import ctypes
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch

HUGE_PAGE = 2 << 20

# Numbers of glibc's mallopt, and what they are set to.
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
KEPT, LARGEST_KEPT = 64 << 20, 32 << 20  # glibc takes no more for the latter
ARENAS = 2  # that keep so much each; one for each thread would be as many as a server has


def reserve(size: int) -> torch.Tensor:
    """`size` bytes on the CPU, uint8, all 0, where a huge page may start. Pages that nobody touched take no memory."""
    memory = mmap.mmap(-1, size + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    if size >= HUGE_PAGE:
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_PAGE * HUGE_PAGE)  # no more than what is used
    return whole[start : start + size]


def view_at(memory: torch.Tensor, start: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The tensor of this dtype and shape that begins at byte `start` of the memory, which is uint8."""
    shape = torch.Size(shape)
    return memory[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def keep_freed() -> None:
    """From now on, memory that is freed stays with the process, up to some 64 MiB in each of a few arenas, where the C
    library is glibc. It otherwise goes back to the kernel, and every page of every step's tensors is got and cleared
    anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(ARENA_MAX, ARENAS)
        mallopt(TRIM_THRESHOLD, KEPT)
        mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
