"""Finds the tensor of a GGUF file for each tensor of the model, and how llama.cpp's converter changed it."""

import re
from collections.abc import Mapping

import gguf
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from loraplex_shard.checkpoint.gguf.file import GgufFile
from loraplex_shard.checkpoint.gguf.origins import Origin, of_experts
from loraplex_shard.checkpoint.gguf.rope import FACTORS, LONG, SHORT

# These tensors are read with the configuration.
CONSUMED = frozenset({FACTORS, LONG, SHORT})
# Architectures whose query and key rows have the two dimensions that are rotated together side by side.
INTERLEAVED = frozenset({"llama", "mistral3", "granite", "smollm3", "granitemoe", "arcee"})
# Architectures whose norm weights are stored with 1 added.
NORMS_PLUS_ONE = frozenset({"gemma", "gemma2", "gemma3", "nemotron"})
QUERY_OR_KEY = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)")
EXPERTS = ".experts."  # transformers makes other tensors of these when it loads them
# By model type: a part of names, and what transformers calls it in files.
ON_DISK = {
    "mixtral": (".mlp.", ".block_sparse_moe."),
    "granitemoe": (".router.", ".router.layer."),
    "granitemoeshared": (".router.", ".router.layer."),
}


def find_origins(file: GgufFile, config: PreTrainedConfig) -> dict[str, Origin]:
    """The origin of each tensor, by the name that it has in a checkpoint of transformers. Tensors that the model does
    not use keep their own names."""
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
