"""What a rank's memory is divided into: the model, the largest steps, adapters, the KV cache."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from loraplex_protos.shard_pb2 import DeviceMemory
from loraplex_shard.checkpoint import Checkpoint
from loraplex_shard.device.parallel import Group
from loraplex_shard.settings import ModelSettings, Quantize, SettingsError

logger = logging.getLogger(__name__)

T = TypeVar("T")

BLOCK_SIZE = 16  # token positions per block of KV cache

CGROUP = Path("/sys/fs/cgroup")
# Of version 2, and of version 1: limit, use, statistics, and what is counted there of files that were read once.
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def check_room_for(
    checkpoint: Checkpoint, dtype: torch.dtype, quantize: Quantize, tp: int, device: torch.device
) -> None:
    """Raises SettingsError if a rank's weights cannot fit into free memory: the kernel would kill the process.
    What is compared is the least that they can take."""
    bits = {"int8": 8, "fp8": 8, "int4": 4, "auto": 4}.get(quantize, 8 * dtype.itemsize)
    weights = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)
    needed = weights * bits // 8 // tp
    free = _free_memory(device)
    if needed > free:
        raise SettingsError(
            f"model: {weights:,} weights take at least {needed / 2**30:.1f} GiB on each rank, but only "
            f"{free / 2**30:.1f} GiB of memory is free: free some, or set quantize to int8 or int4"
        )


def fit_sequences(settings: ModelSettings, state_bytes: int, device: torch.device, kept: int = 0) -> int:
    """How many sequences can run at once: the setting, or as many as have room for their states, `state_bytes` each, in
    half of the memory that the KV cache may have beside what a GPU has `kept` for adapters. Raises SettingsError if
    there is no room for one."""
    if not state_bytes:
        return settings.max_sequences
    budget = _cache_budget(settings, _free_memory(device), device, kept)
    sequences = min(settings.max_sequences, budget // 2 // state_bytes)
    if sequences <= 0:
        raise SettingsError(
            f"model: it keeps {state_bytes:,} bytes for each sequence, more than half of the {budget:,} bytes that the "
            "KV cache may have of the free memory; free some"
        )
    told = f"the model keeps states, {state_bytes / 2**20:.2f} MiB for each sequence, so prefixes are not reused"
    if sequences < settings.max_sequences:
        logger.warning("%s; at most %d sequences run at once, not %d", told, sequences, settings.max_sequences)
    else:
        logger.info("%s", told)
    return sequences


def measure_steps(largest: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """Calls `largest`, which runs the largest steps, and returns what it returns, and how many bytes of a GPU it took
    for a while; 0 on a CPU. Raises SettingsError if that is more than there is."""
    if device.type != "cuda":
        return largest(), 0
    _free_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        result = largest()
    except torch.OutOfMemoryError as error:
        raise SettingsError(
            "max_batch_tokens: the largest steps need more memory than the model leaves of the GPU's: lower it, or "
            f"max_sequences, or set quantize to int8 or int4 ({error})"
        ) from error
    peak = torch.cuda.max_memory_reserved(device)
    _free_memory(device)
    return result, int(peak - torch.cuda.memory_reserved(device))


def adapter_device_bytes(settings: ModelSettings, device: torch.device) -> int:
    """What adapters in slots may take together. 0: there is no limit but the slots, which share the host memory."""
    if settings.adapter_memory_gib:
        return int(settings.adapter_memory_gib * 2**30)
    return int(torch.cuda.mem_get_info(device)[1]) // 10 if device.type == "cuda" else 0


def count_blocks(
    settings: ModelSettings, max_model_len: int, block_bytes: int, device: torch.device, states: int = 0, kept: int = 0
) -> int:
    """The setting kv_blocks, or how many blocks of this rank fit into free memory beside that many bytes of states, and
    those that a GPU has `kept` for adapters and steps; never more than can be used.

    On a CPU a quarter of what is available, divided by the ranks, since each of them counts it. Raises SettingsError if
    not one fits, or fewer than were asked for.
    """
    usable = settings.max_sequences * -(-max_model_len // BLOCK_SIZE)
    free = _free_memory(device)
    if settings.kv_blocks:
        room = free - states - (kept if device.type == "cuda" else 0)
        blocks = min(settings.kv_blocks, usable)
        if blocks * block_bytes > room:
            raise SettingsError(
                f"kv_blocks: {blocks} blocks take {blocks * block_bytes:,} bytes, but {room:,} are free; free "
                f"some, or set kv_blocks to at most {max(0, room // block_bytes)}, or to 0: as many as fit"
            )
        return blocks
    budget = _cache_budget(settings, free, device, kept) - states
    blocks = min(budget // block_bytes, usable) if block_bytes else usable
    if blocks <= 0:
        raise SettingsError(_no_room(settings, block_bytes, budget, device, kept))
    return int(blocks)


def _no_room(settings: ModelSettings, block_bytes: int, budget: int, device: torch.device, kept: int) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (
            f"gpu_memory_fraction: of the GPU's {_gib(total)}, {settings.gpu_memory_fraction:g} may be used; the model "
            f"and other processes take {_gib(total - free)}, steps and adapters {_gib(kept)}, which leaves no block of "
            f"{block_bytes:,} bytes to the KV cache; raise it, or lower max_batch_tokens, max_sequences or "
            "adapter_memory_gib, or set quantize to int8 or int4"
        )
    return (
        f"kv_blocks: not one block of {block_bytes:,} bytes fits into the {budget:,} bytes that the KV cache may "
        "have of the free memory; free some, or set kv_blocks"
    )


def divide(settings: ModelSettings, cache: int, steps: int, adapters: int, device: torch.device) -> DeviceMemory:
    """What the memory is divided into, before the cache is made. Says so in the log."""
    free = _free_memory(device)
    total = int(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else free
    memory = DeviceMemory(total=total, used=total - free, steps=steps, adapters=adapters, cache=cache)
    if device.type == "cuda":
        logger.info(
            "of the GPU's %s, the KV cache gets %s, adapters in slots %s, the largest steps %s; the model and other "
            "processes have %s (gpu_memory_fraction: %g)",
            *map(_gib, (total, cache, adapters, steps, total - free)),
            settings.gpu_memory_fraction,
        )
    else:
        logger.info("of %s of free memory, the KV cache gets %s, adapters %s", *map(_gib, (total, cache, adapters)))
    return memory


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _free_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return available_memory(CGROUP)
    torch.cuda.empty_cache()  # what the allocator keeps of freed tensors is free, too
    return int(torch.cuda.mem_get_info(device)[0])


def _cache_budget(settings: ModelSettings, free: int, device: torch.device, kept: int) -> int:
    """Bytes for the cache and for states."""
    if device.type != "cuda":
        return free // 4 // settings.local_ranks
    total = int(torch.cuda.mem_get_info(device)[1])
    return free - int(total * (1 - settings.gpu_memory_fraction)) - kept


def share_for_adapters(settings: ModelSettings, cache_bytes: int, device: torch.device) -> int:
    """How many bytes of host memory this rank's adapters may take: three eighths of what is free beside the KV cache,
    of which nothing was used yet. The rest is for one that comes before another has left, for those on their way, which
    are in memory several times, and for steps."""
    free = available_memory(CGROUP) // settings.local_ranks
    return max(0, free - (cache_bytes if device.type == "cpu" else 0)) * 3 // 8


def available_memory(cgroup: Path) -> int:
    """Bytes of host memory that this process may still use, the container's limit considered, which the kernel holds
    all its processes and what they read of files against. Files that were read once can be dropped: they count as free.
    """
    available = int(psutil.virtual_memory().available)
    for limit_name, used_name, stat_name, inactive in CGROUP_FILES:
        try:
            limit, used = (cgroup / limit_name).read_text().strip(), int((cgroup / used_name).read_text())
            stat = dict(line.split() for line in (cgroup / stat_name).read_text().splitlines())
        except OSError:
            continue  # not in a container of its own, or of the other version
        if limit != "max":
            available = min(available, max(0, int(limit) - used + int(stat[inactive])))
    return available


def fewest(group: Group, count: int) -> int:
    """The smallest of the ranks' counts, for what all ranks must hold the same of: blocks, bytes of adapters."""
    counts = group.gather(torch.tensor([[count]]), widths=[1] * group.size)
    agreed = torch.zeros(1, dtype=torch.int64) if counts is None else counts.amin().reshape(1)
    group.broadcast_(agreed)
    return int(agreed)


def fit_context(settings: ModelSettings, max_model_len: int, num_blocks: int) -> int:
    """As much of the context as the cache can hold. Raises SettingsError if more was asked for by number."""
    capacity = num_blocks * BLOCK_SIZE
    if settings.max_model_len > capacity:
        raise SettingsError(
            f"max_model_len: the KV cache has {num_blocks} blocks of {BLOCK_SIZE} positions, too few for one sequence "
            f"of {settings.max_model_len}; raise kv_blocks, or set max_model_len to at most {capacity}"
        )
    return min(max_model_len, capacity)
