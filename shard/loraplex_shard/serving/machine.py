"""What the machine that a rank runs on offers, and what the settings make of it."""

import logging
import math
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedConfig

from loraplex_shard.checkpoint import Checkpoint
from loraplex_shard.device.parallel import Group
from loraplex_shard.settings import Device, Dtype, ModelSettings, Quantize, SettingsError

logger = logging.getLogger(__name__)

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
CPU = torch.device("cpu")
OLDEST_GPU = 8, 0  # compute capability: Ampere, the first with bfloat16
FLOAT8_GPU = 8, 9  # Ada and Hopper, the first that multiply float8


def pick_device(device: Device, rank: int) -> torch.device:
    """What the setting says: the rank's own GPU if there are GPUs, else the CPU. Raises SettingsError if a GPU is asked
    for and there is none, or if the GPU is older than the kernels know."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        raise SettingsError(f"device: cuda is not available: {_why_no_gpu()}; or set device to cpu")
    own = torch.device("cuda", rank % torch.cuda.device_count())
    if torch.cuda.get_device_capability(own) < OLDEST_GPU:
        needed = ".".join(map(str, OLDEST_GPU))
        raise SettingsError(f"device: a GPU of compute capability {needed} or above is needed; or set device to cpu")
    return own


def _why_no_gpu() -> str:
    build = torch.version.cuda or torch.version.hip
    if build is None:
        return f"torch {torch.__version__} is built for CPUs alone: install torch for CUDA"
    return (
        f"torch {torch.__version__} finds no GPU: the container may be given none, or the driver be older than {build}"
        " (see nvidia-smi)"
    )


def use(device: torch.device) -> None:
    """Makes a GPU the calling thread's own: kernels are launched on a thread's device, wherever their tensors are."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def pick_dtype(dtype: Dtype, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype to compute in; auto is resolved as the setting's description says."""
    if dtype != "auto":
        return _dtype(dtype)
    text = config.get_text_config(decoder=True)
    stored = _dtype(getattr(config, "dtype", None) or getattr(text, "dtype", None) or "bfloat16")
    if device.type == "cuda":
        return stored
    return torch.float32 if stored == torch.float32 else torch.bfloat16


def pick_quantize(quantize: Quantize, checkpoint: Checkpoint, device: torch.device) -> Quantize:
    """What becomes of the matrices; auto stays auto where the checkpoint is quantized in a form that the device
    computes with, and else is none. Raises SettingsError if the device does not compute in the wanted form."""
    if quantize == "fp8" and not multiplies_float8(device):
        needed = ".".join(map(str, FLOAT8_GPU))
        raise SettingsError(f"quantize: fp8 is for GPUs of compute capability {needed} or above; set it to int8 here")
    kept = checkpoint.prequantized or (checkpoint.in_float8 and multiplies_float8(device))
    return "none" if quantize == "auto" and not kept else quantize


def multiplies_float8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FLOAT8_GPU


def longest_context(settings: ModelSettings, config: PreTrainedConfig) -> int:
    """The setting max_model_len, or the most that the model was made for; never more than that."""
    text = config.get_text_config(decoder=True)
    made_for = int(getattr(text, "max_position_embeddings", 0) or settings.max_model_len)
    if not made_for:
        raise SettingsError("max_model_len: config.json does not state the maximum sequence length: set it")
    ropes = getattr(text, "rope_parameters", None) or {}
    by_layer_type = [rope for rope in ropes.values() if isinstance(rope, dict)]  # else one for all layers
    scaled = [
        rope["factor"] * rope.get("original_max_position_embeddings", made_for)
        for rope in (by_layer_type or [ropes])
        if rope.get("factor")
    ]
    limit = max([made_for, *map(int, scaled)])
    if settings.max_model_len > limit:
        raise SettingsError(f"max_model_len: {settings.max_model_len} exceeds the model's limit of {limit}")
    return settings.max_model_len or limit


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


def fit_sequences(settings: ModelSettings, state_bytes: int, device: torch.device) -> int:
    """How many sequences can run at once: the setting, or as many as have room for their states, `state_bytes` each, in
    half of the memory that the KV cache may have. Raises SettingsError if there is no room for one."""
    if not state_bytes:
        return settings.max_sequences
    budget = _cache_budget(settings, _free_memory(device), device)
    sequences = min(settings.max_sequences, budget // 2 // state_bytes)
    if sequences == 0:
        raise SettingsError(
            f"model: it keeps {state_bytes:,} bytes for each sequence, more than half of the {budget:,} bytes that the "
            "KV cache may have of the free memory; free some"
        )
    kept = f"the model keeps states, {state_bytes / 2**20:.2f} MiB for each sequence, so prefixes are not reused"
    if sequences < settings.max_sequences:
        logger.warning("%s; at most %d sequences run at once, not %d", kept, sequences, settings.max_sequences)
    else:
        logger.info("%s", kept)
    return sequences


def count_blocks(
    settings: ModelSettings, max_model_len: int, block_bytes: int, device: torch.device, states: int = 0
) -> int:
    """The setting kv_blocks, or how many blocks of this rank fit into free memory beside that many bytes of states;
    never more than can be used.

    On a CPU a quarter of what is available, divided by the ranks, since each of them counts it; on a GPU 0.9 of what
    the weights left. Raises SettingsError if not one fits, or fewer than were asked for.
    """
    usable = settings.max_sequences * -(-max_model_len // BLOCK_SIZE)
    free = _free_memory(device)
    budget = _cache_budget(settings, free, device) - states
    if settings.kv_blocks:
        blocks = min(settings.kv_blocks, usable)
        if blocks * block_bytes > free - states:
            raise SettingsError(
                f"kv_blocks: {blocks} blocks take {blocks * block_bytes:,} bytes, but {free - states:,} are free; free "
                f"some, or set kv_blocks to at most {(free - states) // block_bytes}, or to 0: as many as fit"
            )
        return blocks
    blocks = min(budget // block_bytes, usable) if block_bytes else usable
    if blocks == 0:
        raise SettingsError(
            f"kv_blocks: not one block of {block_bytes:,} bytes fits into the {budget:,} bytes that the KV cache may "
            "have of the free memory; free some, or set kv_blocks"
        )
    return int(blocks)


def _free_memory(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_memory(CGROUP)


def _cache_budget(settings: ModelSettings, free: int, device: torch.device) -> int:
    return free * 9 // 10 if device.type == "cuda" else free // 4 // settings.local_ranks


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


def _dtype(name: str | torch.dtype) -> torch.dtype:
    dtype = getattr(torch, name) if isinstance(name, str) else name
    assert isinstance(dtype, torch.dtype)
    return dtype
