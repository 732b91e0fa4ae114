"""torch's `meta` device, which computes nothing, in a GPU's place: what a step asks of it is counted.

Values that are read back from it, for which a GPU's host waits, are zeros.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

DEVICE = torch.device("meta")
ALLOCATIONS = "aten::empty", "aten::new_empty", "aten::empty_like"


class Counts(Counter[str]):
    """`launches` of kernels; `copies` to the device; `waits` of the host: for a copy from memory that the device cannot
    read by itself, or for a value of the device."""


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode, operations arrive that consist of others
            if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        there = any(isinstance(each, torch.Tensor) and each.device == DEVICE for each in tree_leaves(args))
        name = func.name().partition(".")[0]
        if name == "aten::_local_scalar_dense" and there:
            self._counts["waits"] += 1
            return 0
        if name == "aten::_to_copy" and there != (kwargs.get("device", DEVICE if there else None) == DEVICE):
            self._counts["waits"] += not kwargs.get("non_blocking")
            if there:
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
            self._counts["copies"] += 1
        elif there and name == "aten::copy_" and args[1].device != DEVICE:
            self._counts["copies"] += 1
            self._counts["waits"] += not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        elif there and not func.is_view and name not in ALLOCATIONS:
            indices = args[1] if name in ("aten::index", "aten::index_put_", "aten::index_put") else ()
            self._counts["waits"] += any(index is not None and index.dtype == torch.bool for index in indices)
            self._counts["launches"] += 1
        return func(*args, **kwargs)


@contextmanager
def counted() -> Iterator[Counts]:
    """What is asked of the device until the end of the block."""
    counts = Counts()
    tensor = torch.tensor

    def made_there(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is not None and torch.device(device) == DEVICE:
            counts.update(copies=1, waits=1)
        return tensor(*args, device=device, **kwargs)

    def launch(*args: Any, **kwargs: Any) -> None:
        counts["launches"] += 1

    with patch("torch.tensor", made_there), patch.object(GridExecutor, "__call__", launch), _Counting(counts):
        yield counts
