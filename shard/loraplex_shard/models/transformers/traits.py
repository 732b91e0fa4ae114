"""Finds out what a model's code does, by running it on tensors with shapes but no values (torch's meta device).

What our cache or our attention cannot do is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.models.transformers.attention import AttentionCall, Sees, attended_by, placeholder
from loraplex_shard.models.transformers.module_calls import ModuleCalls
from loraplex_shard.models.transformers.pass_through_cache import PassThroughCache, cache_argument
from loraplex_shard.models.transformers.probing import StateRecorder, probe, without_kernels
from loraplex_shard.models.transformers.recurrent import RecurrentLayer
from loraplex_shard.models.transformers.windows import read_window
from loraplex_shard.shapes.heads import Heads

TOKENS = 13  # tokens of the run: a number that is unlikely to be one of a model's own sizes
CLOSED = "transformers' code for it does not let other code compute its attention"
# Arguments of attention functions that do not change what is computed here.
NEUTRAL = {"position_ids", "cache_position", "position_embeddings"}


@dataclass(frozen=True, slots=True)
class ModelTraits:
    attention: tuple[Heads, ...]  # the heads of each attention call of a forward pass, in order
    linear: Mapping[str, bool]  # linear layers that are called, and whether their inputs have one row per token
    embedding: str  # the module that looks up tokens
    head: str  # the linear layer that computes logits; empty: there is none
    idle: tuple[str, ...]  # models within the model that are not called for text
    backbone: str  # the module that returns the last hidden states
    output: type[ModelOutput]  # the type of the backbone's output
    vocab_size: int
    recurrent: tuple[RecurrentLayer, ...]  # the layers that keep states
    rotates: bool  # it has a rotary embedding
    generates: bool = True  # if not, it has no head

    def without_head(self) -> "ModelTraits":
        """The traits of the same model without its head, which only computes hidden states."""
        linear = {name: fed for name, fed in self.linear.items() if name != self.head}
        idle = (*self.idle, self.head) if self.head else self.idle
        return replace(self, linear=linear, head="", idle=idle, generates=False)


class NothingChosen(TorchFunctionMode):
    """Answers which values are not zero, as code for experts asks. Tensors without values cannot say, so none is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.nonzero, torch.Tensor.nonzero):
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        return func(*args, **(kwargs or {}))


@dataclass
class AttentionRecorder:
    """Implements Attending: records the calls, and answers with tensors without values."""

    positions: int
    attention: list[Heads] = field(default_factory=list)
    windows: list[tuple[torch.Tensor | None, int | None]] = field(default_factory=list)  # of masks, by their bases

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.attention.append(self._heads(call))
        query = call.query
        return query.new_empty((1, query.shape[2], query.shape[1], call.value.shape[3]))

    def mask(self, tokens: int, sees: Sees, device: torch.device) -> torch.Tensor:
        mask = placeholder(tokens, device)
        self.windows.append((mask._base, read_window(sees, self.positions)))
        return mask

    def _heads(self, call: AttentionCall) -> Heads:
        query, key, value, mask, options = call.query, call.key, call.value, call.mask, call.options
        if key.shape[2] != query.shape[2] or value.shape[2] != query.shape[2]:
            raise CheckpointError("its attention reads other positions than a token's own")
        if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
            raise CheckpointError(f"its attention has {query.shape[1]} heads on {key.shape[1]} KV heads")
        extra = {n for n, v in options.items() if isinstance(v, torch.Tensor)} - NEUTRAL - {"s_aux"}
        if extra:
            raise CheckpointError(f"its attention depends on {', '.join(sorted(extra))}")
        if mask is None:
            causal = options.get("is_causal")
            if not (getattr(call.module, "is_causal", True) if causal is None else causal):
                raise CheckpointError("its attention is bidirectional")
            window = options.get("sliding_window")
        else:
            known = [window for base, window in self.windows if base is mask._base]
            if not known or mask.shape[-2:] != (TOKENS, TOKENS):
                raise CheckpointError("it makes its own attention masks")
            window = known[0]
        scale = options.get("scaling")
        return Heads(
            query=query.shape[1],
            kv=key.shape[1],
            dim=query.shape[3],
            window=window if window and window < self.positions else None,
            soft_cap=float(options.get("softcap") or 0),
            scale=query.shape[3] ** -0.5 if scale is None else float(scale),
            value_dim=value.shape[3],
        )


def read_traits(model: PreTrainedModel, positions: int) -> ModelTraits:
    """Runs a model that is on the meta device, for sequences of at most `positions` positions. Raises
    CheckpointError."""
    recorder, calls, cache = AttentionRecorder(positions), ModuleCalls(model), PassThroughCache(model.config)
    states = StateRecorder(calls)
    with calls.counted(), attended_by(recorder), NothingChosen(), without_kernels(), cache.holding(states):
        logits = run(model, cache)
    if cache.updates > len(recorder.attention) or not (states or recorder.attention):
        raise CheckpointError(CLOSED)
    if set(cache.recurrent_layers) - {key.layer for key in states}:
        raise CheckpointError("it keeps state outside of its cache")
    with attended_by(AttentionRecorder(positions)), NothingChosen(), without_kernels():
        recurrent = probe(model, states.modules, cache, TOKENS, lambda: run(model, cache))
    backbone, output = calls.backbone
    return ModelTraits(
        attention=tuple(recorder.attention),
        linear=calls.linear(TOKENS),
        embedding=_name(model, model.get_input_embeddings()),
        head=_name(model, model.get_output_embeddings()),  # type: ignore[no-untyped-call]
        idle=calls.idle,
        backbone=backbone,
        output=output,
        vocab_size=logits.shape[-1],
        recurrent=recurrent,
        rotates=any(hasattr(model.get_submodule(name), "rope_type") for name in calls.called),
    )


def _name(model: PreTrainedModel, wanted: nn.Module | None) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def run(model: PreTrainedModel, cache: PassThroughCache) -> torch.Tensor:
    """Runs a forward pass of one row of tokens, without values. Returns the logits."""
    ids = torch.zeros((1, TOKENS), dtype=torch.long, device="meta")
    positions = torch.arange(TOKENS, device="meta")[None]
    options = {cache_argument(model): cache, "use_cache": True}
    logits: torch.Tensor = model(input_ids=ids, position_ids=positions, **options).logits
    return logits
