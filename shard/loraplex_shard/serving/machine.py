"""What the machine that a rank runs on offers, and what the settings make of it."""

import logging

import torch
from transformers import PreTrainedConfig

from loraplex_shard.checkpoint import Checkpoint
from loraplex_shard.settings import Device, Dtype, KvDtype, ModelSettings, Quantize, SettingsError

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
BATCH_TOKENS = {"cpu": 256, "cuda": 2048}  # per step: a GPU needs more to be busy, and computes them sooner
OLDEST_GPU = 8, 0  # compute capability: Ampere, the first with bfloat16
FLOAT8_GPU = 8, 9  # Ada and Hopper, the first that multiply float8
_FLOAT8 = ".".join(map(str, FLOAT8_GPU))


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


def pick_kv_dtype(kv_dtype: KvDtype, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The KV cache's. Raises SettingsError if the device does not compute with it."""
    if kv_dtype == "fp8" and not multiplies_float8(device):
        raise SettingsError(f"kv_dtype: fp8 is for GPUs of compute capability {_FLOAT8} or above; set it to int8 here")
    return {"auto": dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kv_dtype]


def pick_quantize(quantize: Quantize, checkpoint: Checkpoint, device: torch.device) -> Quantize:
    """What becomes of the matrices; auto stays auto where the checkpoint is quantized in a form that the device
    computes with, and else is none. Raises SettingsError if the device does not compute in the wanted form."""
    if quantize == "fp8" and not multiplies_float8(device):
        raise SettingsError(f"quantize: fp8 is for GPUs of compute capability {_FLOAT8} or above; set it to int8 here")
    kept = checkpoint.prequantized or (checkpoint.in_float8 and multiplies_float8(device))
    return "none" if quantize == "auto" and not kept else quantize


def multiplies_float8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FLOAT8_GPU


def batch_tokens(settings: ModelSettings, device: torch.device) -> int:
    """The setting max_batch_tokens, or what suits the device; at least max_sequences, so that every decode fits."""
    least = settings.max_sequences
    if 0 < settings.max_batch_tokens < least:
        logger.warning("max_batch_tokens: %d is raised to max_sequences, %d", settings.max_batch_tokens, least)
    return max(settings.max_batch_tokens or BATCH_TOKENS[device.type], least)


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


def _dtype(name: str | torch.dtype) -> torch.dtype:
    dtype = getattr(torch, name) if isinstance(name, str) else name
    assert isinstance(dtype, torch.dtype)
    return dtype
