"""Collectives of ranks on one host over shared memory, by the kernels in kernels/csrc/collectives.cpp.

They take some microseconds where a socket takes hundreds. The ranks find each other over a process group that exists.
"""

import ctypes
import fcntl
import mmap
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist

from loraplex_protos.errors import LoraplexError
from loraplex_shard.device.hosts import gather_texts, host_id
from loraplex_shard.kernels.library import KINDS, Kernels

SHARED = Path("/dev/shm")
# What a rank hands to the others at once: small enough to stay in a processor's cache.
SLOT_BYTES = 128 << 10
# Seconds that a rank may come later to a collective than another. Ranks that are lost are noticed at once; this is for
# one that waits for something else, and long, since ranks load the model between two collectives.
PATIENCE = 300.0


class LostRankError(LoraplexError):
    """A rank did not come to a collective. The group cannot go on."""


class SharedMemory:
    """One rank's end of it. Tensors are contiguous and on the CPU.

    All ranks make the same calls in the same order, from one thread. They raise LostRankError once a rank has left,
    has died, or is `patience` seconds behind this one.
    """

    def __init__(self, rank: int, size: int, fd: int, kernels: Kernels, patience: float) -> None:
        """`fd` is a file of `memory_bytes(kernels, size)` zeros, opened by each rank for itself. It is owned here."""
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)  # held until this process ends: the others see it live
        # It is not unmapped while a call on another thread may still use it.
        self._memory = mmap.mmap(fd, memory_bytes(kernels, size))
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._kernels, self._rank, self._patience = kernels, rank, patience
        self._place = {"memory": address, "rank": rank}
        self._group = self._place | {"size": size, "slot_bytes": SLOT_BYTES, "fd": fd, "patience": float(patience)}

    @classmethod
    def connect(cls, rank: int, size: int, kernels: Kernels | None, patience: float = PATIENCE) -> Self | None:
        """To be called on all ranks of the default process group. None on all of them if one has no kernels or is on
        another host, or if there is no memory to share."""
        hosts = set(gather_texts(host_id() if kernels else "", size))
        if len(hosts) > 1 or "" in hosts:
            return None
        assert kernels is not None
        name = torch.frombuffer(bytearray(secrets.token_bytes(16)), dtype=torch.uint8)
        created = _create(_path(name), memory_bytes(kernels, size)) if rank == 0 else None
        try:
            dist.broadcast(name, src=0)
            shared = None
            with suppress(OSError):
                fd = os.open(_path(name), os.O_RDWR | os.O_NOFOLLOW)
                shared = cls(rank, size, fd, kernels, patience)
            mapped = torch.tensor(shared is not None, dtype=torch.int32)
            dist.all_reduce(mapped, dist.ReduceOp.MIN)
        finally:
            if created:
                _path(name).unlink()
        return shared if mapped else None

    def all_reduce_(self, tensor: torch.Tensor) -> None:
        """Replaces `tensor`, float32 or bfloat16, by its sum over all ranks: the same bits on all of them."""
        self.check(self._kernels.call("all_reduce", **self.all_reduce_arguments(tensor)))

    def all_reduce_arguments(self, tensor: torch.Tensor) -> dict[str, int | float]:
        """Of the kernel, for `tensor`; they hold as long as this object and the tensor. Its result is for `check`."""
        assert tensor.is_contiguous()
        return {
            **self._group,
            "kind": KINDS[tensor.dtype],
            "count": tensor.numel(),
            "data": tensor.data_ptr(),
        }

    def broadcast_(self, tensor: torch.Tensor) -> None:
        """Replaces `tensor` by rank 0's."""
        assert tensor.is_contiguous()
        self.check(self._kernels.call("broadcast", **self._group, bytes=tensor.nbytes, data=tensor.data_ptr()))

    def gather(self, tensor: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        """The ranks' tensors [n, widths[rank]] side by side on rank 0, None on the others."""
        assert tensor.is_contiguous()
        width_bytes = (ctypes.c_long * len(widths))(*(width * tensor.itemsize for width in widths))
        gathered = tensor.new_empty((len(tensor), sum(widths))) if self._rank == 0 else None
        result = self._kernels.call(
            "gather",
            **self._group,
            rows=len(tensor),
            widths=ctypes.addressof(width_bytes),
            data=tensor.data_ptr(),
            out=None if gathered is None else gathered.data_ptr(),
        )
        self.check(result)
        return gathered

    def leave(self) -> None:
        """Lets a collective that is under way fail, on all ranks. There must be no other one after it."""
        self._kernels.call("leave_group", **self._place)

    def check(self, result: int) -> None:
        """Raises LostRankError if `result`, a collective's, says so."""
        if result > 0:
            raise LostRankError(f"rank {result - 1} has left the tensor-parallel group: restart all its ranks")
        if result < 0:
            raise LostRankError(
                f"rank {-result - 1} is more than {self._patience:g} s behind rank {self._rank} "
                "of its tensor-parallel group: restart all its ranks"
            )


def memory_bytes(kernels: Kernels, size: int) -> int:
    """The size of the memory that a group of `size` ranks shares."""
    return kernels.call("shared_bytes", size=size, slot_bytes=SLOT_BYTES)


def _path(name: torch.Tensor) -> Path:
    return SHARED / f"loraplex-{bytes(name.tolist()).hex()}"


def _create(path: Path, size: int) -> bool:
    """Makes the file, of zeros, if there is room for it."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except OSError:
        return False
    try:
        os.posix_fallocate(fd, 0, size)  # a file that only claims its size would kill whoever writes to it
    except OSError:
        path.unlink()
        return False
    finally:
        os.close(fd)
    return True
