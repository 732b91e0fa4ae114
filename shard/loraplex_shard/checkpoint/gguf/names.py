"""Which tensors of a GGUF file are which of the model's, and how llama.cpp's converter changed them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import gguf
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from loraplex_shard.checkpoint.gguf.file import GgufFile
from loraplex_shard.checkpoint.gguf.rope import FACTORS, LONG, SHORT

# Read with the configuration.
CONSUMED = frozenset({FACTORS, LONG, SHORT})
# Their rows of queries and keys have the two dimensions side by side that are rotated together.
INTERLEAVED = frozenset({"llama", "mistral3", "granite", "smollm3"})
# Their norms' scales are stored with 1 added.
NORMS_PLUS_ONE = frozenset({"gemma", "gemma2", "gemma3", "nemotron"})
QUERY_OR_KEY = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)")
# Of a layer's experts, transformers makes two tensors when it loads them. On disk, each has three matrices, by these
# names, which are llama.cpp's tensors of all experts' gates, ups and downs.
FUSED = "experts.gate_up_proj", "experts.down_proj"
EXPERTS = "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"
NAMES = "mlp", ("gate_proj", "up_proj", "down_proj")
MIXTRALS_NAMES = "block_sparse_moe", ("w1", "w3", "w2")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one of the model's tensors comes from."""

    tensor: str
    expert: int | None = None  # whose part of the tensor it is
    interleaved: bool = False
    minus_one: bool = False
    lacks_dimension: bool = False  # a matrix of one row was stored as a vector


def find_origins(file: GgufFile, config: PreTrainedConfig) -> dict[str, Origin]:
    """By the names that the model's tensors have in a checkpoint of transformers'. Those that the model has no use for
    keep their own."""
    architecture = str(file.metadata["general.architecture"])
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    block, matrices = MIXTRALS_NAMES if config.model_type == "mixtral" else NAMES
    found: dict[str, Origin] = {}
    for name, shape in _model_tensors(config).items():
        module, _, suffix = name.rpartition(".")
        stored = f"{known.get_name(module)}.{suffix}"
        if name.endswith(FUSED):
            layer = ".".join(name.split(".")[:3])
            for matrix, part in zip(matrices, EXPERTS, strict=True):
                stored = f"{layer.replace('model.layers', 'blk')}.{part}.weight"
                of = {f"{layer}.{block}.experts.{each}.{matrix}.weight": each for each in range(shape[0])}
                found |= {name: Origin(stored, each) for name, each in of.items() if stored in file.tensors}
        elif stored in file.tensors:
            found[name.replace(".mlp.", f".{block}.")] = Origin(
                stored,
                interleaved=architecture in INTERLEAVED and QUERY_OR_KEY.fullmatch(stored) is not None,
                minus_one=architecture in NORMS_PLUS_ONE and name.endswith("norm.weight"),
                lacks_dimension=len(file.tensors[stored].shape) < len(shape),
            )
    used = {origin.tensor for origin in found.values()} | CONSUMED
    return found | {name: Origin(name) for name in file.tensors.keys() - used}


def _model_tensors(config: PreTrainedConfig) -> Mapping[str, tuple[int, ...]]:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
