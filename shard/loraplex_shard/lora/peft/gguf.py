"""Converts adapters of llama.cpp to PEFT's form. Its converter renames tensors, and changes the order of
the rows of Llama's queries and keys, as it does for models.

Only alpha and the tokens of activated adapters are in the metadata; which modules are adapted is shown by the tensors.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.config import MAX_LORA_RANK, AdapterConfig
from loraplex_shard.lora.peft.targets import Target
from loraplex_shard.lora.peft.tensor_names import PREFIX
from loraplex_shard.lora.weights.deltas import name_of_a, name_of_b

_NAME = re.compile(r"(?P<stored>.+)\.weight\.lora_(?P<half>[ab])")
_QUERY_OR_KEY = re.compile(r"blk\.\d+\.attn_[qk]")
_LAYER = re.compile(r"\.(\d+)\.")
_HUB = "https://huggingface.co/"
_WAY_OUT = "use the adapter that the file was converted from"


class GgufConfig(AdapterConfig):
    """The file's metadata in PEFT's terms."""

    peft_type: Literal["GGUF"]
    architecture: Annotated[str, Field(max_length=64)]  # llama.cpp's name of the base's

    def scale(self, lora_rank: int, alpha: float) -> float:
        return alpha / lora_rank if alpha else 1.0  # as in llama.cpp


def is_gguf(fields: Mapping[str, Any]) -> bool:
    """Whether these are the metadata of a GGUF file."""
    return "general.architecture" in fields or "general.type" in fields


def gguf_config(fields: Mapping[str, Any]) -> GgufConfig:
    """Raises AdapterInvalidError if the file is not an adapter, pydantic's ValidationError if metadata are wrong."""
    if (held := fields.get("general.type", "model")) != "adapter":
        raise AdapterInvalidError(f"the GGUF file's general.type is {str(held)[:100]!r}: it is not an adapter")
    if (kind := fields.get("adapter.type")) != "lora":
        raise AdapterInvalidError(f"the GGUF file's adapter.type is {str(kind)[:100]!r}: only 'lora' is served")
    address = fields.get("general.base_model.0.repo_url")
    return GgufConfig.model_validate(
        {
            "peft_type": "GGUF",
            "architecture": fields.get("general.architecture"),
            "lora_alpha": fields.get("adapter.lora.alpha", 0.0),
            "alora_invocation_tokens": fields.get("adapter.alora.invocation_tokens") or None,
            "base_model_name_or_path": str(address).removeprefix(_HUB) if address else None,
        }
    )


def in_pefts_terms(
    tensors: Mapping[str, torch.Tensor], config: GgufConfig, modules: Iterable[str], base: BaseModel
) -> dict[str, torch.Tensor]:
    """The tensors with PEFT's names and order of rows. `modules` are the base's linear ones.

    Raises AdapterInvalidError if the adapter was made for another architecture, or has a tensor of another module.
    """
    # Most adapters are not GGUF files, and importing these takes a second.
    import gguf

    from loraplex_shard.checkpoint.gguf.kinds import architectures_of
    from loraplex_shard.checkpoint.gguf.names import INTERLEAVED

    fitting = architectures_of(base.architecture)
    if config.architecture not in fitting:
        known = f"its adapters have {' or '.join(sorted(fitting))}" if fitting else "its GGUF adapters are not served"
        raise AdapterInvalidError(
            f"the GGUF file's general.architecture is {config.architecture!r}, but the base is {base.architecture}:"
            f" {known}; {_WAY_OUT}"
        )
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == config.architecture)
    modules = (*modules, base.embedding)
    layers = 1 + max(int(number[1]) for module in modules if (number := _LAYER.search(module)))
    known_names = gguf.get_tensor_name_map(kind, layers)
    by_stored = {known_names.get_name(module): module for module in modules}
    found = dict[str, torch.Tensor]()
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        module = by_stored.get(match["stored"]) if match else None
        if match is None or module is None or tensor.dim() != 2:
            reason = f"{name[:200]}: only LoRA of this model's linear layers and embedding is read"
            raise AdapterInvalidError(f"the GGUF file: {reason}; {_WAY_OUT}")
        is_a = match["half"] == "a"
        if module == base.embedding:
            found[f"{PREFIX}{module}.lora_embedding_{'A' if is_a else 'B'}"] = tensor.T if is_a else tensor
        elif is_a:
            found[name_of_a(module)] = tensor
        else:
            turned = config.architecture in INTERLEAVED and _QUERY_OR_KEY.fullmatch(match["stored"])
            found[name_of_b(module)] = _deinterleaved(tensor, base.head_dim) if turned else tensor
    return found


def targets_in_file(
    config: GgufConfig, tensors: Mapping[str, torch.Tensor], modules: Iterable[str]
) -> dict[str, Target]:
    """The modules that have a B, by PEFT's names. Each has the lora_rank of its B, as in llama.cpp."""
    targets = dict[str, Target]()
    for module in modules:
        b = tensors.get(name_of_b(module), tensors.get(f"{PREFIX}{module}.lora_embedding_B"))
        if b is None:
            continue
        if not 1 <= (lora_rank := b.shape[1]) <= MAX_LORA_RANK:
            raise AdapterInvalidError(f"the GGUF file: {module} has the lora_rank {lora_rank}: 1 to {MAX_LORA_RANK}")
        targets[module] = Target(lora_rank, config.scale(lora_rank, config.lora_alpha))
    if not targets:
        raise AdapterInvalidError("the GGUF file has no tensors of LoRA")
    return targets


def _deinterleaved(b: torch.Tensor, head_dim: int) -> torch.Tensor:
    """GGUF puts the two dimensions that are rotated together side by side; transformers puts all first dimensions
    before all second ones."""
    assert head_dim
    if len(b) % head_dim:  # its shape will be refused
        return b
    return b.view(len(b) // head_dim, head_dim // 2, 2, b.shape[1]).transpose(1, 2).reshape(b.shape)
