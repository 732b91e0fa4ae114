"""Memory that a process can hand to another one on this machine: nameless, counted where it is used, and gone when
nobody has it open or mapped any more. A container's /dev/shm is not involved: its size is a limit of its own."""

import ctypes
import mmap
import os
from typing import Self

import torch

from loraplex_shard.device.memory import HUGE_PAGE, reserve
from loraplex_shard.device.priority import gently

MAP_FIXED, MADV_HUGEPAGE, MADV_POPULATE_READ = 0x10, 14, 22
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
_LIBC.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class HandedMemory:
    """A file descriptor of `size` bytes, all 0 at first. Pages that nobody touched take no memory."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size

    @classmethod
    def of(cls, size: int) -> Self:
        fd = os.memfd_create("adapter", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return cls(fd, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """What is mapped stays."""
        os.close(self.fd)

    def write(self, data: memoryview, start: int) -> None:
        """Writes bytes from byte `start` on, without the interpreter's lock."""
        while len(data):
            written = os.pwrite(self.fd, data, start)
            start, data = start + written, data[written:]

    def map(self, populate: bool = False) -> torch.Tensor:
        """The memory, uint8, where a huge page may start; mapped until the tensor is gone. `populate`: its pages are
        looked up now, without the interpreter's lock and with low priority, and not when they are read."""
        memory = reserve(self.size)  # addresses: what is mapped there instead leaves with them
        if not self.size:
            return memory
        access, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED
        if _LIBC.mmap(memory.data_ptr(), self.size, access, flags, self.fd, 0) != memory.data_ptr():
            raise OSError(ctypes.get_errno(), "the memory cannot be mapped")
        # Both are for speed: a kernel may not know them.
        _LIBC.madvise(memory.data_ptr(), self.size // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)  # no more than what is used
        if populate:
            pages = -(-self.size // mmap.PAGESIZE) * mmap.PAGESIZE
            gently(lambda: _LIBC.madvise(memory.data_ptr(), pages, MADV_POPULATE_READ))
        return memory
