"""Memory for what every step reads: large, and of huge pages where the kernel grants them. Knows nothing of its use.

Addresses are looked up page by page: with pages of 4 KiB, a processor that reads some hundred MB waits for look-ups as
well as for the bytes.
"""

import mmap
from contextlib import suppress

import torch

HUGE_PAGE = 2 << 20


def reserve(size: int) -> torch.Tensor:
    """`size` bytes on the CPU, uint8, all 0, where a huge page may start. Pages that nobody touched take no memory."""
    memory = mmap.mmap(-1, size + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE_PAGE:
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size]
