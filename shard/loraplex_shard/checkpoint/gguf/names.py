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
INTERLEAVED = frozenset({"llama", "granite", "smollm3"})
# Their norms' scales are stored with 1 added.
NORMS_PLUS_ONE = frozenset({"gemma", "gemma2", "gemma3", "nemotron"})
QUERY_OR_KEY = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)")
# All experts' gates and ups are one tensor in transformers, the gates first.
GATE_UP, GATE_AND_UP = "gate_up_proj", ("ffn_gate_exps", "ffn_up_exps")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one of the model's tensors comes from."""

    parts: tuple[str, ...]  # of several, the second dimensions are joined: experts' rows
    interleaved: bool = False
    minus_one: bool = False
    lacks_dimension: bool = False  # a matrix of one row was stored as a vector


def find_origins(file: GgufFile, config: PreTrainedConfig) -> dict[str, Origin]:
    """By the names that transformers gives. Tensors that the model has no use for keep their own."""
    architecture = str(file.metadata["general.architecture"])
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found = {}
    for name, shape in _model_tensors(config).items():
        parts = _stored(known, name)
        if parts and all(part in file.tensors for part in parts):
            found[name] = Origin(
                parts,
                architecture in INTERLEAVED and QUERY_OR_KEY.fullmatch(parts[0]) is not None,
                architecture in NORMS_PLUS_ONE and name.endswith("norm.weight"),
                len(file.tensors[parts[0]].shape) < len(shape),
            )
    used = {part for origin in found.values() for part in origin.parts} | CONSUMED
    return found | {name: Origin((name,)) for name in file.tensors.keys() - used}


def _model_tensors(config: PreTrainedConfig) -> Mapping[str, tuple[int, ...]]:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _stored(known: gguf.TensorNameMap, name: str) -> tuple[str, ...]:
    module, dot, suffix = name.rpartition(".")
    if suffix == GATE_UP:
        block = re.sub(r".*layers\.(\d+)\..*", r"blk.\1", name)
        return tuple(f"{block}.{part}.weight" for part in GATE_AND_UP)
    if suffix not in ("weight", "bias"):
        module, dot, suffix = name, ".", "weight"
    own = known.get_name(module)
    return () if own is None else (f"{own}{dot}{suffix}",)
