"""Tiny checkpoints in the layouts of GPTQ, AWQ and compressed-tensors, packed here integer by integer as these are
defined, together with the weights that they represent."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.shard.decoders import save_checkpoint
from tests.shard.test_models import llama

WEIGHTS = "model.safetensors"
Store = Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]
COLUMNS, UNITS = 128, 256  # for the model's matrices
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the row, of each eight, in each nibble, lowest nibble first


@dataclass(frozen=True)
class Integers:
    """A matrix w = scale * (value - zero)."""

    values: torch.Tensor  # [rows, columns] int64
    zeros: torch.Tensor  # [rows, groups] int64
    scales: torch.Tensor  # [rows, groups] float16
    group: int

    @property
    def weights(self) -> torch.Tensor:
        scales, zeros = (each.repeat_interleave(self.group, 1) for each in (self.scales.float(), self.zeros))
        return scales * (self.values - zeros)


@dataclass(frozen=True)
class Method:
    """How one kind of tool quantizes and stores matrices."""

    config: dict[str, Any]
    store: Callable[[Integers], dict[str, torch.Tensor]]
    bits: int = 4
    group: int = 32
    symmetric: bool = False


def rounded(matrix: torch.Tensor, method: Method) -> Integers:
    group = matrix.shape[1] if method.group == -1 else method.group
    groups, most = matrix.unflatten(1, (-1, group)), 2**method.bits - 1
    if method.symmetric:
        scales = (groups.abs().amax(-1) * 2 / most).half()
        zeros = torch.full(scales.shape, 2 ** (method.bits - 1))
    else:
        low = groups.amin(-1)
        scales = ((groups.amax(-1) - low) / most).half()
        zeros = (-low / scales.float()).round().clamp(1, most).long()
    values = (groups / scales.float()[:, :, None]).round() + zeros[:, :, None]
    return Integers(values.clamp(0, most).long().flatten(1), zeros, scales, group)


def packed(values: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """[n, m] -> [n, m * bits / 32] int32. The first integers have the lowest bits, unless `order` permutes them."""
    if 32 % bits:
        stream = ((values[:, :, None] >> torch.arange(bits)) & 1).flatten(1)
        return packed(torch.nn.functional.pad(stream, (0, -stream.shape[1] % 32)), bits=1)
    per_word = 32 // bits
    words = torch.nn.functional.pad(values, (0, -values.shape[1] % per_word)).unflatten(1, (-1, per_word))
    if order is not None:
        words = words[:, :, list(order)]
    return sum(words[:, :, place] << bits * place for place in range(per_word)).to(torch.int32)


def gptq(bits: int, zeros_less: int) -> Callable[[Integers], dict[str, torch.Tensor]]:
    def store(integers: Integers) -> dict[str, torch.Tensor]:
        return {
            "qweight": packed(integers.values, bits).T,
            "qzeros": packed((integers.zeros - zeros_less).T, bits),
            "scales": integers.scales.T,
            "g_idx": (torch.arange(integers.values.shape[1]) // integers.group).int(),
            "bias": torch.zeros(len(integers.values), dtype=torch.float16),
        }

    return store


def awq(integers: Integers) -> dict[str, torch.Tensor]:
    return {
        "qweight": packed(integers.values.T, 4, AWQ_ORDER),
        "qzeros": packed(integers.zeros.T, 4, AWQ_ORDER),
        "scales": integers.scales.T,
    }


def pack_quantized(bits: int, symmetric: bool) -> Callable[[Integers], dict[str, torch.Tensor]]:
    def store(integers: Integers) -> dict[str, torch.Tensor]:
        zeros = {} if symmetric else {"weight_zero_point": packed(integers.zeros.T, bits).T}
        return zeros | {
            "weight_packed": packed(integers.values, bits),
            "weight_scale": integers.scales,
            "weight_shape": torch.tensor(integers.values.shape),
        }

    return store


def int_quantized(integers: Integers) -> dict[str, torch.Tensor]:
    return {"weight": (integers.values - 128).to(torch.int8), "weight_scale": integers.scales}


def compressed_tensors(layout: str, **weights: Any) -> dict[str, Any]:
    scheme = {"targets": ["Linear"], "weights": {"type": "int", "dynamic": False, "actorder": None} | weights}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": scheme}}


def with_zero_points(integers: Integers) -> dict[str, torch.Tensor]:
    zeros = (integers.zeros - 128).to(torch.int8)
    return int_quantized(integers) | {"weight_zero_point": zeros}


def bitsandbytes_8_bits(integers: Integers) -> dict[str, torch.Tensor]:
    return {
        "weight": (integers.values - 128).to(torch.int8),
        "SCB": integers.scales.float().flatten() * 127,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _gptq_config(bits: int, group: int, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False} | fields


def _packed(bits: int, group: int, symmetric: bool) -> Method:
    fields = {"num_bits": bits, "group_size": group, "strategy": "group", "symmetric": symmetric}
    config = compressed_tensors("pack-quantized", **fields)
    return Method(config, pack_quantized(bits, symmetric), bits, group, symmetric)


INT8 = compressed_tensors("int-quantized", num_bits=8, strategy="channel", group_size=None, symmetric=True)
INT8_WITH_ZEROS = compressed_tensors("int-quantized", num_bits=8, strategy="channel", group_size=None, symmetric=False)
METHODS = {
    "GPTQ, symmetric, 64": Method(_gptq_config(4, 64, sym=True), gptq(4, 1), group=64, symmetric=True),
    "GPTQ, asymmetric, 32": Method(_gptq_config(4, 32, sym=False), gptq(4, 1)),
    "GPTQ, version 2, asymmetric, 128": Method(
        _gptq_config(4, 128, checkpoint_format="gptq_v2"), gptq(4, 0), group=128
    ),
    "GPTQ, one group": Method(_gptq_config(4, -1), gptq(4, 1), group=-1),
    "GPTQ, 8 bits": Method(_gptq_config(8, 32), gptq(8, 1), bits=8, symmetric=True),
    "GPTQ, 8 bits, asymmetric": Method(_gptq_config(8, 64), gptq(8, 1), bits=8, group=64),
    "AWQ, 64": Method({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, awq, group=64),
    "compressed-tensors W4A16, 32": _packed(4, 32, symmetric=True),
    "compressed-tensors W4A16, 64": _packed(4, 64, symmetric=True),
    "compressed-tensors W4A16, 128": _packed(4, 128, symmetric=True),
    "compressed-tensors W4A16, asymmetric, 32": _packed(4, 32, symmetric=False),
    "compressed-tensors W8A16, 128": _packed(8, 128, symmetric=True),
    "compressed-tensors, 3 bits": _packed(3, 64, symmetric=False),
    "compressed-tensors, 6 bits": _packed(6, 64, symmetric=True),
    "GPTQ, 2 bits, 64": Method(_gptq_config(2, 64), gptq(2, 1), bits=2, group=64),
    "GPTQ, 3 bits, 64": Method(_gptq_config(3, 64), gptq(3, 1), bits=3, group=64),
    "AutoRound, 64": Method(
        _gptq_config(4, 64) | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        gptq(4, 1),
        group=64,
    ),
    "bitsandbytes, 8 bits": Method(
        {"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes_8_bits, bits=8, group=-1, symmetric=True
    ),
    "compressed-tensors W8A8, asymmetric": Method(INT8_WITH_ZEROS, with_zero_points, bits=8, group=-1),
    "compressed-tensors W8A8": Method(INT8, int_quantized, bits=8, group=-1, symmetric=True),
}


def save_quantized(method: Method, directory: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Saves a random model whose linear layers, except the head, are stored in this form. Returns their weights by
    name."""

    def store(matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        integers = rounded(matrix, method)
        return method.store(integers), integers.weights

    return save_stored(method.config, store, directory)


def save_stored(config: dict[str, Any], store: Store, directory: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The same with any `store`, which turns a matrix into tensors by suffix and the weights that they represent."""
    model = llama(hidden_size=COLUMNS, intermediate_size=UNITS, num_hidden_layers=1, num_attention_heads=4)
    save_checkpoint(model, directory)
    tensors, weights = load_file(directory / WEIGHTS), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        stored, weights[name] = store(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + suffix: part.contiguous() for suffix, part in stored.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    edit_config(directory, quantization_config=config)
    return directory, weights


def edit_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensor(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(directory / WEIGHTS)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def save_dequantized(weights: dict[str, torch.Tensor], quantized: Path, directory: Path) -> Path:
    """The same model with these weights, unquantized."""
    config = json.loads((quantized / "config.json").read_text())
    del config["quantization_config"]
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    others = {name: tensor for name, tensor in load_file(quantized / WEIGHTS).items() if "_proj" not in name}
    save_file(others | weights, directory / WEIGHTS, metadata={"format": "pt"})
    return directory
