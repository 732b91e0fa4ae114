"""Checks, before anything is loaded, whether transformers' code for a checkpoint can run here."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from loraplex_shard.checkpoint.base import Checkpoint, CheckpointError
from loraplex_shard.device.parallel import Group, GroupSizeError
from loraplex_shard.models.transformers import experts  # noqa: F401  # registers our experts
from loraplex_shard.models.transformers.attention import IMPLEMENTATION
from loraplex_shard.models.transformers.linear import Now
from loraplex_shard.models.transformers.plan import Plan
from loraplex_shard.models.transformers.replacing import Replacement
from loraplex_shard.models.transformers.rotary import freeze_rotary
from loraplex_shard.models.transformers.survey import Survey, survey
from loraplex_shard.ops.reference import ReferenceOperations

META = torch.device("meta")
LONGEST_REASON = 120  # characters of an error of transformers' code


def examine(checkpoint: Checkpoint, positions: int, rank: int = 0, size: int = 1) -> Survey:
    """Returns what a rank's part of the model does, for sequences of at most `positions` positions.

    Raises CheckpointError, with what the code does that our cache or our attention cannot; GroupSizeError if the model
    cannot be cut for `size` ranks.
    """
    check_class(checkpoint)
    with refused_by_name(checkpoint):
        with META:
            model = build(checkpoint.config, torch.float32, positions)
        whole = survey(model, positions)
    if size == 1:
        return whole
    plan = Plan(model.tp_plan or {}, checkpoint.architecture, rank, size)
    parts = Replacement(whole, plan, Group(rank, size), ReferenceOperations(), Now(META), dtypes(model, torch.float32))
    try:
        parts.apply(model)
        return replace(whole, attention=survey(model, positions).attention)
    except (CheckpointError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise GroupSizeError(f"{checkpoint.architecture} cannot be cut into {size} ranks: {error}") from error


@contextmanager
def refused_by_name(checkpoint: Checkpoint) -> Iterator[None]:
    """Turns whatever transformers' code raises into a CheckpointError that names the model."""
    name = f"{checkpoint.model_id}: {checkpoint.architecture} is not served"
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error.message}") from error
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:LONGEST_REASON]}"
        raise CheckpointError(f"{name}: transformers' code for it fails: {reason}") from error


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


def check_class(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a class whose attention cannot be replaced, or that needs more than a KV cache."""
    with refused_by_name(checkpoint):
        _check(checkpoint)


def _check(checkpoint: Checkpoint) -> None:
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(checkpoint.config), ())
    classes = {each.__name__: each for each in (found if isinstance(found, tuple) else (found,))}
    if checkpoint.architecture not in classes:
        raise CheckpointError("transformers has no causal language model of this name")
    if checkpoint.config.is_encoder_decoder or getattr(checkpoint.config, "add_cross_attention", False):
        raise CheckpointError("it needs an encoder")
    own = classes[checkpoint.architecture]
    if not own._supports_attention_backend:
        if own._is_stateful:
            raise CheckpointError("it keeps state besides keys and values")
        raise CheckpointError("transformers' code for it does not let other code compute its attention")
