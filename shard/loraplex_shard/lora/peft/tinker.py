"""Adapters as Tinker exports them, in PEFT's terms. They have another name for the lm head, and train it although their
target_modules are all-linear, by which PEFT means all but the head."""

import re
from collections.abc import Mapping

import torch

from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.config import AdapterConfig

_HEAD = re.compile(r"\b(?:model\.)?unembed_tokens(?=\.lora_[AB]\b)")


def in_pefts_terms(
    config: AdapterConfig, stored: Mapping[str, torch.Tensor], base: BaseModel
) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """The configuration and the tensors; those of other trainers as they are."""
    renamed = {_HEAD.sub(base.head, name): tensor for name, tensor in stored.items()}
    modules = config.target_modules
    if renamed.keys() != stored.keys() and isinstance(modules, str) and modules.lower() == "all-linear":
        all_but_embedding = rf"(?!{re.escape(base.embedding)}$).+"
        config = config.model_copy(update={"target_modules": all_but_embedding})
    return config, renamed
