"""Checks of a checkpoint's tensors before they are loaded."""

from collections.abc import Iterable

import torch

from loraplex_shard.layers.parameters import TensorReader

NAMES_IN_MESSAGE = 10
ROWS_AT_A_TIME = 4096


def listed(names: Iterable[str]) -> str:
    """The first few names in order, for a message."""
    ordered = sorted(names)
    more = len(ordered) - NAMES_IN_MESSAGE
    return "tensor " + ", ".join(ordered[:NAMES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")


def differ(reader: TensorReader, first: str, second: str, dtype: torch.dtype) -> bool:
    """Whether two matrices differ in this dtype. transformers does not tie such matrices, even if config.json asks for
    it.
    """
    if reader.shape(first) != reader.shape(second):
        return True
    starts = range(0, reader.shape(first)[0], ROWS_AT_A_TIME)
    parts = (slice(start, start + ROWS_AT_A_TIME) for start in starts)
    return not all(torch.equal(*(reader.read(name, rows).to(dtype) for name in (first, second))) for rows in parts)
