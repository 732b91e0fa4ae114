"""Checks, before anything is loaded, whether transformers' code for a checkpoint can run here."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from loraplex_shard.checkpoint.base import Checkpoint, CheckpointError
from loraplex_shard.device.parallel import Group, GroupSizeError
from loraplex_shard.models.text_part import TextModel
from loraplex_shard.models.transformers.building import build, dtypes
from loraplex_shard.models.transformers.linear import ForwardContext
from loraplex_shard.models.transformers.parallel_rules import ParallelRules
from loraplex_shard.models.transformers.pass_through_cache import PassThroughCache
from loraplex_shard.models.transformers.replacing import Replacement
from loraplex_shard.models.transformers.traits import CLOSED, ModelTraits, read_traits
from loraplex_shard.ops.reference import ReferenceOperations

META = torch.device("meta")
# Errors of transformers' code.
FAILURES = ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError
LONGEST_REASON = 120  # characters of an error of transformers' code


def check_model(
    checkpoint: Checkpoint | TextModel,
    positions: int,
    rank: int = 0,
    size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> ModelTraits:
    """Returns what a rank's part of the model does, for sequences of at most `positions` positions, computed in
    `dtype`.

    Raises CheckpointError, with what the code does that our cache or our attention cannot; GroupSizeError if the model
    cannot be cut for `size` ranks.
    """
    check_class(checkpoint)
    with refused_by_name(checkpoint):
        try:
            with META:
                model = build(checkpoint.config, dtype, positions)
            whole = read_traits(model, positions)
        except FAILURES as error:
            if _class(checkpoint)._supports_attention_backend:
                raise
            raise CheckpointError(CLOSED) from error
    if size == 1:
        return whole
    if whole.recurrent:
        raise GroupSizeError(f"{checkpoint.architecture} keeps states, which are not cut for ranks: use tp 1")
    rules = ParallelRules(model.tp_plan or {}, checkpoint.architecture, rank, size)
    parts = Replacement(
        whole, rules, Group(rank, size), ReferenceOperations(), ForwardContext(META), dtypes(model, dtype)
    )
    try:
        parts.apply(model)
        return replace(whole, attention=read_traits(model, positions).attention)
    except (CheckpointError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise GroupSizeError(f"{checkpoint.architecture} cannot be cut into {size} ranks: {error}") from error


@contextmanager
def refused_by_name(checkpoint: Checkpoint | TextModel) -> Iterator[None]:
    """Turns whatever transformers' code raises into a CheckpointError that names the model."""
    name = f"{checkpoint.model_id}: {checkpoint.architecture} is not served"
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error.message}") from error
    except FAILURES as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:LONGEST_REASON]}"
        raise CheckpointError(f"{name}: transformers' code for it fails: {reason}") from error


def check_class(checkpoint: Checkpoint | TextModel) -> None:
    """Raises CheckpointError for a class whose attention cannot be replaced, or that needs more than a KV cache."""
    with refused_by_name(checkpoint):
        _check(checkpoint)


def _check(checkpoint: Checkpoint | TextModel) -> None:
    own = _class(checkpoint)
    if checkpoint.config.is_encoder_decoder or getattr(checkpoint.config, "add_cross_attention", False):
        raise CheckpointError("it needs an encoder")
    if own._is_stateful and not PassThroughCache(checkpoint.config).recurrent_layers:
        raise CheckpointError("it keeps state besides keys and values")


def _class(checkpoint: Checkpoint | TextModel) -> Any:
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(checkpoint.config), ())
    classes = {each.__name__: each for each in (found if isinstance(found, tuple) else (found,))}
    if checkpoint.architecture not in classes:
        raise CheckpointError("transformers has no causal language model of this name")
    return classes[checkpoint.architecture]
