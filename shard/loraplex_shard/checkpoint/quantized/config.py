"""Reads config.json's quantization_config: the method by which a checkpoint was quantized. Methods that are not served
are refused by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.checkpoint.quantized.bitsandbytes import Bitsandbytes
from loraplex_shard.checkpoint.quantized.compressed_tensors import CompressedIntegers
from loraplex_shard.checkpoint.quantized.floats import Float4, Float8, Mxfp4Experts
from loraplex_shard.checkpoint.quantized.gptq import AwqGemm, Gptq
from loraplex_shard.checkpoint.quantized.hqq import Hqq
from loraplex_shard.checkpoint.quantized.stored import Layout

METHODS = (
    *("gptq", "awq", "auto-round", "intel/auto-round", "compressed-tensors", "bitsandbytes", "hqq"),
    *("fp8", "fbgemm_fp8", "modelopt", "modelopt_fp4", "quark", "mxfp4"),
)
FORMATS = (  # of compressed-tensors
    *("dense", "pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mixed-precision"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)
Fields = Mapping[str, Any]


def read_layouts(config: Fields) -> tuple[Layout, ...]:
    """The ways in which the checkpoint's quantized matrices are stored. Its tensors show which matrices these are."""
    match _served(config, "quant_method", METHODS):
        case "gptq":
            return (_gptq(config),)
        case "awq":
            return (_awq(config),)
        case "auto-round" | "intel/auto-round":
            return (_auto_round(config),)
        case "compressed-tensors":
            return _compressed_tensors(config)
        case "bitsandbytes":
            return (Bitsandbytes(),)
        case "hqq":
            return (Hqq(),)
        case "mxfp4":
            return (Mxfp4Experts(),)
        case _:
            return (Float8(_block(config.get("weight_block_size"))), Float4())


def _gptq(config: Fields) -> Gptq:
    _served(config, "is_marlin_format", (False,), default=False)
    version = _served(config, "checkpoint_format", ("gptq", "gptq_v2"), default="gptq")
    return Gptq(_served(config, "bits", (2, 3, 4, 8)), _group(config), 1 if version == "gptq" else 0)


def _awq(config: Fields) -> AwqGemm:
    _served(config, "bits", (4,))
    _served(config, "zero_point", (True,), default=True)
    if str(config.get("version", "gemm")).lower() != "gemm":
        raise _refusal("version", config["version"], ("gemm",))
    return AwqGemm(_group(config))


def _auto_round(config: Fields) -> Layout:
    """AutoRound uses the formats of other methods, and says which."""
    packing = str(config.get("packing_format", "auto_round:auto_gptq"))
    if packing.endswith("awq"):
        return _awq(config)
    if packing.endswith("gptq"):
        return _gptq(config)
    raise _refusal("packing_format", packing, ("auto_round:auto_gptq", "auto_round:auto_awq"))


def _compressed_tensors(config: Fields) -> tuple[Layout, ...]:
    _served(config, "format", FORMATS)
    _served(config.get("sparsity_config") or {}, "format", ("dense",), default="dense")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise CheckpointError(
            "config.json: quantization_config: transform_config, which rotates activations, is not served"
        )
    groups = config.get("config_groups") or {}
    schemes = [group.get("weights") or {} for group in groups.values()]
    blocks = [scheme["block_structure"] for scheme in schemes if scheme.get("block_structure")]
    asymmetric = bool(schemes) and all(scheme.get("symmetric") is False for scheme in schemes)
    return (
        CompressedIntegers(asymmetric, frozenset(map(_columns_of_group, schemes))),
        Float8(_block(blocks[0] if blocks else None)),
        Float4(),
    )


def _columns_of_group(scheme: Fields) -> int | None:
    """None: all columns."""
    size = scheme.get("group_size")
    has_groups = isinstance(size, int) and size > 0 and scheme.get("strategy") not in ("channel", "tensor")
    return size if has_groups else None


def _block(size: object) -> tuple[int, int] | None:
    match size:
        case None:
            return None
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case _:
            raise CheckpointError(f"config.json: quantization_config: {size!r} is not a block's rows and columns")


def _group(config: Fields) -> int | None:
    """The group size in columns; None for -1, which stands for all columns."""
    size = config.get("group_size")
    if not isinstance(size, int) or (size != -1 and size <= 0):
        raise CheckpointError(f"config.json: quantization_config: group_size {size!r} is neither positive nor -1")
    return None if size == -1 else size


def _served(config: Fields, name: str, values: Sequence[Any], **default: Any) -> Any:
    value = config.get(name, *default.values())
    if value not in values:
        raise _refusal(name, value, values)
    return value


def _refusal(name: str, value: object, values: Sequence[object]) -> CheckpointError:
    served = " or ".join(map(repr, values))
    return CheckpointError(f"config.json: quantization_config: {name} {value!r} is not served, only {served}")
