"""Connects transformers' modeling code to our attention. The code looks up its attention function and its mask function
by name, and finds ours under IMPLEMENTATION. The caller of a forward pass decides who answers them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from loraplex_shard.ops.base import Operations, Step
from loraplex_shard.shapes.cache import KVCache
from loraplex_shard.shapes.heads import Heads

IMPLEMENTATION = "loraplex"

# batch, head, query, key -> whether the query sees the key; the arguments are indices that broadcast.
Sees = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The arguments of an attention call of transformers' modeling code. Queries, keys and values are
    [1, heads, tokens, dim]; `options` are the keyword arguments."""

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    options: Mapping[str, Any]


class Attending(Protocol):
    """Answers the attention calls of a forward pass. All tokens are in one row."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Returns [1, tokens, query heads, value dim]."""
        ...

    def mask(self, tokens: int, sees: Sees, device: torch.device) -> torch.Tensor:
        """Returns the mask that the modeling code passes to all layers: [1, 1, tokens, tokens]."""
        ...


_attending: ContextVar[Attending] = ContextVar("attending")


@contextmanager
def attended_by(attending: Attending) -> Iterator[None]:
    token = _attending.set(attending)
    try:
        yield
    finally:
        _attending.reset(token)


class PagedAttention:
    """Attention over a paged cache. The n-th call of a forward pass uses the n-th layer of the cache."""

    def __init__(self, layers: tuple[Heads, ...], ops: Operations, step: Step, cache: KVCache) -> None:
        self._layers = zip(layers, cache.layers, strict=True)
        self._ops, self._step = ops, step

    def attend(self, call: AttentionCall) -> torch.Tensor:
        heads, cache = next(self._layers)
        parts = [part[0].transpose(0, 1).flatten(1) for part in (call.query, call.key, call.value)]
        qkv, sinks = torch.cat(parts, dim=1), call.options.get("s_aux")
        self._ops.rotate_and_write(qkv, heads, None, None, self._step, cache)
        out = self._ops.attention(qkv, heads, self._step, cache, None if sinks is None else sinks.float().contiguous())
        return out.view(1, len(qkv), heads.query, heads.value_dim)

    def mask(self, tokens: int, sees: Sees, device: torch.device) -> torch.Tensor:
        return placeholder(tokens, device)


def placeholder(tokens: int, device: torch.device) -> torch.Tensor:
    """A mask that takes no memory. Nobody reads its values."""
    return torch.empty((1, 1, 1, 1), dtype=torch.bool, device=device).expand(1, 1, tokens, tokens)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    return _attending.get().attend(AttentionCall(module, query, key, value, attention_mask, options)), None


def _mask(*, q_length: int, mask_function: Sees, device: torch.device, **options: Any) -> torch.Tensor:
    return _attending.get().mask(q_length, mask_function, device)


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
