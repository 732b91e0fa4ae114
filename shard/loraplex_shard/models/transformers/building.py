"""Builds a model of transformers without values: its parameters are on the meta device."""

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from loraplex_shard.models.transformers import experts  # noqa: F401  # registers our experts
from loraplex_shard.models.transformers.attention import IMPLEMENTATION
from loraplex_shard.models.transformers.rotary import freeze_rotary


def build(config: PreTrainedConfig, dtype: torch.dtype, positions: int) -> PreTrainedModel:
    """Builds the model for sequences of at most `positions` positions. Its parameters are on the meta device, its
    buffers on torch's default device."""
    make: Any = AutoModelForCausalLM.from_config
    options = {"attn_implementation": IMPLEMENTATION, "experts_implementation": IMPLEMENTATION}
    with init_empty_weights(include_buffers=False):
        model: Any = make(config, dtype=dtype, trust_remote_code=False, **options)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):  # the original looks through each batch
            module.warn_if_padding_and_no_attention_mask = lambda *_: None  # type: ignore[method-assign]
    freeze_rotary(model, positions)
    built: PreTrainedModel = model.eval()
    return built


def dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each tensor, as transformers loads it. Some classes keep some tensors in float32."""
    found = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    kept = model._get_dtype_plan(dtype)
    if kept:
        pattern, names, _ = build_glob_alternation(list(kept))
        for name in found:
            match = pattern.search(name)
            if match is not None and match.lastgroup is not None:
                found[name] = kept[names[match.lastgroup]]
    return found
