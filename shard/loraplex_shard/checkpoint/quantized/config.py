"""config.json's quantization_config: by which method a checkpoint was quantized. Others are refused by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.checkpoint.quantized.layouts import AwqGemm, Gptq, IntQuantized, Layout, PackQuantized

METHODS = "gptq", "awq", "compressed-tensors"
Fields = Mapping[str, Any]


def read_layout(config: Fields) -> Layout:
    """How the checkpoint's quantized matrices are stored. Which ones are, their tensors say."""
    match _served(config, "quant_method", METHODS):
        case "gptq":
            return _gptq(config)
        case "awq":
            return _awq(config)
        case _:
            return _compressed_tensors(config)


def _gptq(config: Fields) -> Layout:
    _served(config, "desc_act", (False,), default=False)
    _served(config, "is_marlin_format", (False,), default=False)
    version = _served(config, "checkpoint_format", ("gptq", "gptq_v2"), default="gptq")
    return Gptq(_bits(config, "bits"), _group(config), 1 if version == "gptq" else 0)


def _awq(config: Fields) -> Layout:
    _served(config, "bits", (4,))
    _served(config, "zero_point", (True,), default=True)
    if str(config.get("version", "gemm")).lower() != "gemm":
        raise _refusal("version", config["version"], ("gemm",))
    return AwqGemm(_group(config))


def _compressed_tensors(config: Fields) -> Layout:
    layout = _served(config, "format", ("pack-quantized", "int-quantized"))
    _served(config.get("sparsity_config") or {}, "format", ("dense",), default="dense")
    groups = config.get("config_groups")
    schemes = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    if not schemes or not isinstance(schemes[0], Mapping) or any(scheme != schemes[0] for scheme in schemes):
        raise CheckpointError("config.json: quantization_config: config_groups must have one and the same `weights`")
    weights = schemes[0]
    _served(weights, "type", ("int",), default="int")
    _served(weights, "actorder", (None, False, "static", "weight"), default=None)
    by_group = _served(weights, "strategy", ("group", "channel"), default="group") == "group"
    group = _group(weights) if by_group else None
    bits, symmetric = _bits(weights, "num_bits"), _served(weights, "symmetric", (True, False), default=True)
    if layout == "pack-quantized":
        return PackQuantized(bits, group, symmetric)
    _served(weights, "num_bits", (8,))
    _served(weights, "symmetric", (True,), default=True)
    return IntQuantized(group)


def _bits(config: Fields, name: str) -> int:
    return int(_served(config, name, (4, 8)))


def _group(config: Fields) -> int | None:
    """Columns; None for -1, which is all of them."""
    size = config.get("group_size")
    if not isinstance(size, int) or (size != -1 and (size <= 0 or size % 32)):
        raise CheckpointError(
            f"config.json: quantization_config: group_size {size!r} is not served, only multiples of 32 and -1"
        )
    return None if size == -1 else size


def _served(config: Fields, name: str, values: Sequence[Any], **default: Any) -> Any:
    value = config.get(name, *default.values())
    if value not in values:
        raise _refusal(name, value, values)
    return value


def _refusal(name: str, value: object, values: Sequence[object]) -> CheckpointError:
    served = " or ".join(map(repr, values))
    return CheckpointError(f"config.json: quantization_config: {name} {value!r} is not served, only {served}")
