"""Where a layer's parameters come from: which slices of which checkpoint tensors, so that a layer loads itself."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Source:
    """A slice of one checkpoint tensor. A parameter is its sources' rows one after the other."""

    tensor: str
    shape: tuple[int, ...]  # that the whole tensor must have
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    repeat: int | None = None  # a vector that becomes so many equal rows


class TensorReader(Protocol):
    """The part of a checkpoint that a layer needs."""

    def read(self, name: str, rows: slice = ..., columns: slice = ...) -> torch.Tensor: ...


class SourcedLayer(nn.Module):
    """A layer that says where its parameters come from. They may be on the meta device until it loads them."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[str, tuple[Source, ...]] = {}

    def declare(self, name: str, shape: tuple[int, ...], *sources: Source) -> None:
        """Registers parameter `name`, to be filled from `sources`."""
        self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))
        self.sources[name] = sources

    def load(self, reader: TensorReader, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
        """Fills the parameters in their final dtype and place, tensor by tensor; yields each tensor's name."""
        for name, sources in self.sources.items():
            data = torch.empty(self.get_parameter(name).shape, dtype=dtype, device=device)
            row = 0
            for source in sources:
                piece = reader.read(source.tensor, source.rows, source.columns)
                if source.repeat is not None:
                    piece = piece.expand(source.repeat, -1)
                data[row : row + piece.shape[0]].copy_(piece)
                row += piece.shape[0]
                yield source.tensor
            assert row == data.shape[0]
            self.register_parameter(name, nn.Parameter(data, requires_grad=False))
