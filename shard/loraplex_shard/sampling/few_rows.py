"""Rows of logits that are looked at a few at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

IN_CACHE = 2**18  # numbers that a thread looks at together


def by_rows(reduce: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    """What `reduce` makes of all rows: on a CPU of few at a time, so that what it computes on the way stays in caches
    and takes no memory, which is two to three times as fast."""
    if logits.device.type != "cpu":
        return reduce(logits, *others)
    few = max(1, IN_CACHE * torch.get_num_threads() // logits.shape[-1])
    parts = [slice(first, first + few) for first in range(0, len(logits), few)] or [slice(0)]
    return torch.cat([reduce(*(rows[part] for rows in (logits, *others))) for part in parts])
