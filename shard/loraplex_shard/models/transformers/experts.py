"""Fused experts. transformers' own code computes them. It is registered under our name, so that a model can also run on
tensors without values."""

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from loraplex_shard.models.transformers.attention import IMPLEMENTATION


def _experts(module: nn.Module, hidden: torch.Tensor, *routing: Any) -> torch.Tensor:
    if hidden.is_meta:
        return torch.empty_like(hidden)
    out: torch.Tensor = grouped_mm_experts_forward(module, hidden, *routing)
    return out


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)
