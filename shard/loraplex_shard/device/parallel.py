"""Tensor parallelism: the ranks that hold one copy of a model together, and the rules by which it is cut.

Knows nothing of layers: a layer asks for its slice and for its one collective.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.rendezvous import rendezvous

from loraplex_protos.errors import LoraplexError
from loraplex_shard.device import gpus
from loraplex_shard.device.lifeline import LifeLine
from loraplex_shard.device.shared_memory import PATIENCE, SharedMemory
from loraplex_shard.device.troubles import GroupLostError
from loraplex_shard.kernels.library import KINDS, Kernels

# After which NCCL ends the process: a collective waits for other ranks' kernels to be compiled at most. Ranks that end
# are noticed at once; this is for a link or a GPU that hangs.
NCCL_SECONDS = 60


class GroupSizeError(LoraplexError):
    """The model cannot be cut into that many ranks."""


class Group:
    """This process's place among the ranks. A group of size 1 needs no process group and does nothing.

    The collectives must be called by all ranks in the same order, from one thread. Once a rank is lost, they raise or,
    on GPUs, hang until the process ends: see `watch`. Tensors on the CPU can be given to them on GPUs, too.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        shared: SharedMemory | None = None,
        lifeline: LifeLine | None = None,
        nccl: dist.ProcessGroup | None = None,
    ) -> None:
        """`shared`: where the ranks are on one host, what serves them better than their process group. Recorded
        programs can call it. `lifeline`: to the other ranks, if there are any. `nccl`: what tensors on GPUs go through,
        if not through the default process group."""
        assert 0 <= rank < size
        self.rank = rank
        self.size = size
        self.shared = shared
        self._lifeline = lifeline
        self._nccl = nccl

    @classmethod
    def connect(
        cls,
        rank: int,
        size: int,
        rendezvous_url: str,
        device: torch.device,
        kernels: Kernels | None,
        through_host: bool = False,
    ) -> Self:
        """Joins the group; returns when all ranks have. `rendezvous_url` is one that torch.distributed knows. Raises
        SettingsError if two ranks have the same GPU, and GroupLostError if the ranks do not reach each other.

        kernels: those of the CPU (kernels/library.py), if there are any. through_host: GPUs exchange tensors over gloo,
        slowly, and ranks may have the same one.
        """
        if size == 1:
            return cls(rank, size)
        with _named(f"rendezvous: rank {rank} of {size} does not reach the others at {rendezvous_url}"):
            store, _, _ = next(rendezvous(rendezvous_url, rank, size))
            # After the end of a rank, rank 0 may still be about to end. Its store would tell of the former rank, and
            # rank 0's end would not be noticed before the time is over.
            if store.add(f"rank {rank} joined", 1) > 1:
                raise GroupLostError(
                    f"rendezvous: rank {rank} of {size} has already joined a group at {rendezvous_url}: "
                    "all ranks of that group must end first (and if it is a file, remove it)"
                )
            patience = timedelta(seconds=PATIENCE)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
        shared, nccl = None, None
        if device.type == "cpu":
            shared = SharedMemory.connect(rank, size, kernels)
        elif not through_host:
            gpus.check_own(device, size)
            # With its device, it connects now, so that a broken link shows before the model is read.
            with _named(f"rank {rank} of {size}: NCCL does not connect the GPUs (NCCL_DEBUG=INFO says more)"):
                nccl = dist.new_group(backend="nccl", timeout=timedelta(seconds=NCCL_SECONDS), device_id=device)
        return cls(rank, size, shared, LifeLine.connect(rank, size, rendezvous_url), nccl)

    def all_reduce_(self, tensor: torch.Tensor) -> None:
        """Replaces `tensor` by its sum over all ranks, which is the same on all of them."""
        if self.size == 1:
            return
        if self.shared and tensor.dtype in KINDS:
            self.shared.all_reduce_(tensor)
        else:
            dist.all_reduce(tensor, group=self._carrier(tensor))

    def gather(self, tensor: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        """The ranks' tensors [n, widths[rank]] side by side on rank 0, None on the others."""
        assert tensor.shape[1] == widths[self.rank]
        if self.size == 1:
            return tensor
        if self.shared:
            return self.shared.gather(tensor, widths)
        padded = F.pad(tensor, (0, max(widths) - tensor.shape[1])).contiguous()
        if self.rank != 0:
            dist.gather(padded, dst=0, group=self._carrier(tensor))
            return None
        gathered = [torch.empty_like(padded) for _ in widths]
        dist.gather(padded, gathered, dst=0, group=self._carrier(tensor))
        return torch.cat([part[:, :width] for part, width in zip(gathered, widths, strict=True)], dim=1)

    def broadcast_(self, tensor: torch.Tensor) -> None:
        """Replaces `tensor` by rank 0's."""
        if self.size == 1:
            return
        if self.shared:
            self.shared.broadcast_(tensor)
        else:
            dist.broadcast(tensor, src=0, group=self._carrier(tensor))

    def watch(self, lost: Callable[[], None]) -> None:
        """From now on `lost` is called, on a thread, when another rank ends before `let_go`."""
        if self._lifeline:
            self._lifeline.watch(lost)

    def beat(self) -> None:
        """From now on the other ranks notice it if this process hangs as a whole."""
        if self._lifeline:
            self._lifeline.beat()

    def let_go(self) -> None:
        """The other ranks may end from now on."""
        if self._lifeline:
            self._lifeline.let_go()

    def close(self) -> None:
        """Leaves the group."""
        if self.shared:
            self.shared.leave()
        if self._lifeline:
            self._lifeline.close()
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def recordable_on_gpu(self) -> bool:
        """Whether CUDA graphs can hold its collectives."""
        return self.size == 1 or self._nccl is not None

    def _carrier(self, tensor: torch.Tensor) -> dist.ProcessGroup | None:
        """The process group that the tensor goes through; None: the default one."""
        return self._nccl if tensor.is_cuda else None


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Errors of torch.distributed as a GroupLostError, with their first line, which is not part of a trace."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # dist.DistError is a RuntimeError
        raise GroupLostError(f"{what}: {str(error).partition(chr(10))[0]}") from error


@dataclass(frozen=True, slots=True)
class HeadPartition:
    """The attention heads of one rank. Each of its query heads reads one of its KV heads."""

    query: slice
    kv: slice
    kv_copies: int = 1  # ranks that hold the same KV heads


def partition_evenly(total: int, rank: int, size: int) -> slice:
    """Part `rank` of range(total) cut into `size` runs of near-equal length, the longer ones first."""
    if size > total:
        raise GroupSizeError(f"cannot cut {total} into {size} parts: use at most {total} tensor-parallel ranks")
    length, longer = divmod(total, size)
    start = rank * length + min(rank, longer)
    return slice(start, start + length + (rank < longer))


def partition_units(total: int, rank: int, size: int) -> slice:
    """Like partition_evenly, but where `total` allows it, parts are multiples of 64 or, if that would make them too
    uneven, of 16: rows of a weight then begin where tensor cores and vectors can load them, and no group of a
    quantized one is cut."""
    for unit in (64, 16):
        if total % unit == 0 and total // unit >= 8 * size:  # no part is more than an eighth longer than another
            units = partition_evenly(total // unit, rank, size)
            return slice(units.start * unit, units.stop * unit)
    return partition_evenly(total, rank, size)


def partition_panels(total: int, rank: int, size: int) -> slice:
    """Like partition_evenly, but each part except the last is a multiple of 16, as parts of a packed weight must be."""
    panels = partition_evenly(-(-total // 16), rank, size)
    return slice(panels.start * 16, min(panels.stop * 16, total))


def partition_heads(heads: int, kv_heads: int, rank: int, size: int) -> HeadPartition:
    """The heads of `rank`: whole KV groups (a KV head and the query heads that read it) where there are enough.

    With more ranks than KV heads each rank has one KV head, and ranks that share one share its query heads.
    Raises GroupSizeError if a rank would be left without a query head.
    """
    assert heads % kv_heads == 0
    group = heads // kv_heads
    if size <= kv_heads:
        kv = partition_evenly(kv_heads, rank, size)
        return HeadPartition(slice(kv.start * group, kv.stop * group), kv)
    sharers = [partition_evenly(size, kv_head, kv_heads) for kv_head in range(kv_heads)]
    if sharers[0].stop > group:
        raise GroupSizeError(
            f"{heads} attention heads in {kv_heads} groups cannot be cut over {size} tensor-parallel ranks: "
            f"use at most {kv_heads * group}"
        )
    kv_head = next(head for head, ranks in enumerate(sharers) if rank < ranks.stop)
    ranks = sharers[kv_head]
    query = partition_evenly(group, rank - ranks.start, ranks.stop - ranks.start)
    first = kv_head * group
    copies = ranks.stop - ranks.start
    return HeadPartition(slice(first + query.start, first + query.stop), slice(kv_head, kv_head + 1), copies)
