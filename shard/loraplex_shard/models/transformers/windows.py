"""Finds out what a mask function of transformers lets a token see: everything before it, or a window."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.models.transformers.attention import Sees

SAMPLES = 64


class Zeros(TorchFunctionMode):
    """Treats tensors without values as zeros. A mask function may look at a batch's padding, which is zero here."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = (torch.zeros(a.shape, dtype=a.dtype) if isinstance(a, torch.Tensor) and a.is_meta else a for a in args)
        return func(*known, **(kwargs or {}))


def read_window(sees: Sees, positions: int) -> int | None:
    """The number of positions that a token sees, itself included, in sequences of `positions` positions; None: all
    before it.

    Raises CheckpointError for masks of any other form.
    """
    keys = torch.arange(positions)
    window = int(_row(sees, positions - 1, keys).sum())
    for query in sorted({*range(0, positions, max(1, positions // SAMPLES)), *range(min(positions, SAMPLES))}):
        expected = (keys <= query) & (keys > query - window)
        if not torch.equal(_row(sees, query, keys), expected):
            raise CheckpointError(f"its attention is neither causal nor a sliding window, for {positions} positions")
    return window if window < positions else None


def _row(sees: Sees, query: int, keys: torch.Tensor) -> torch.Tensor:
    try:
        with Zeros():
            seen = sees(0, 0, torch.tensor(query), keys)
    except (IndexError, RuntimeError):
        raise CheckpointError("its attention masks depend on more than positions") from None
    return torch.as_tensor(seen).expand(len(keys))
