"""An adapter's tensors in one piece of memory, in the order in which a step reads them. Knows not what they mean."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from loraplex_shard.lora.weights import LayerWeights
from loraplex_shard.memory import reserve

ALIGNMENT = 64  # bytes: a line of a processor's cache


def in_one_piece(layers: Mapping[str, LayerWeights]) -> dict[str, LayerWeights]:
    """The layers, on the CPU, copied into memory of their own."""
    arena = _Arena(sum(_aligned(tensor.nbytes) for layer in layers.values() for tensor in _tensors(layer)))
    return {name: _copied(layer, arena) for name, layer in layers.items()}


def _copied(layer: LayerWeights, arena: "_Arena") -> LayerWeights:
    shrink = arena.copy(layer.shrink)
    expansions = tuple(replace(e, weight=arena.copy(e.weight)) for e in layer.expansions)
    scales = None if layer.scales is None else arena.copy(layer.scales)
    return LayerWeights(layer.index, shrink, expansions, scales)


def _tensors(layer: LayerWeights) -> list[torch.Tensor]:
    scales = [] if layer.scales is None else [layer.scales]
    return [layer.shrink, *(expansion.weight for expansion in layer.expansions), *scales]


class _Arena:
    def __init__(self, size: int) -> None:
        self._free = reserve(size)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        memory = self._free[: tensor.nbytes]
        self._free = self._free[_aligned(tensor.nbytes) :]
        return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
