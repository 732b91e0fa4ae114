"""Which tensors of a GGUF file are which of the model's, and how llama.cpp's converter changed them."""

import re
from collections.abc import Mapping

import gguf
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from loraplex_shard.checkpoint.gguf.file import GgufFile
from loraplex_shard.checkpoint.gguf.origins import Origin, of_experts
from loraplex_shard.checkpoint.gguf.rope import FACTORS, LONG, SHORT

# Read with the configuration.
CONSUMED = frozenset({FACTORS, LONG, SHORT})
# Their rows of queries and keys have the two dimensions side by side that are rotated together.
INTERLEAVED = frozenset({"llama", "mistral3", "granite", "smollm3", "granitemoe"})
# Their norms' scales are stored with 1 added.
NORMS_PLUS_ONE = frozenset({"gemma", "gemma2", "gemma3", "nemotron"})
QUERY_OR_KEY = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)")
EXPERTS = ".experts."  # of whose tensors transformers makes others when it loads them
# What else transformers calls otherwise on disk.
ON_DISK = {
    "mixtral": (".mlp.", ".block_sparse_moe."),
    "granitemoe": (".router.", ".router.layer."),
    "granitemoeshared": (".router.", ".router.layer."),
}


def find_origins(file: GgufFile, config: PreTrainedConfig) -> dict[str, Origin]:
    """By the names that the model's tensors have in a checkpoint of transformers'. Those that the model has no use for
    keep their own."""
    architecture = str(file.metadata["general.architecture"])
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found: dict[str, Origin] = {}
    for name, shape in _model_tensors(config).items():
        if EXPERTS in name:
            of_layer = of_experts(config.model_type, name.split(".")[2], shape[0])
            found |= {name: origin for name, origin in of_layer if origin.tensor in file.tensors}
            continue
        own = name.replace(*ON_DISK.get(config.model_type, ("", "")))
        module, _, suffix = own.rpartition(".") if own.endswith((".weight", ".bias")) else (own, "", "weight")
        stored = f"{known.get_name(module)}.{suffix}"
        if stored in file.tensors:
            found[own] = Origin(
                stored,
                interleaved=architecture in INTERLEAVED and QUERY_OR_KEY.fullmatch(stored) is not None,
                minus_one=architecture in NORMS_PLUS_ONE and name.endswith("norm.weight"),
                lacks_dimension=len(file.tensors[stored].shape) < len(shape),
            )
    used = {origin.tensor for origin in found.values()} | CONSUMED
    used |= {origin.fusion.second for origin in found.values() if origin.fusion}
    return found | {name: Origin(name) for name in file.tensors.keys() - used}


def _model_tensors(config: PreTrainedConfig) -> Mapping[str, tuple[int, ...]]:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
