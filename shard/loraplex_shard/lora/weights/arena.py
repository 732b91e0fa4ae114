"""Puts an adapter's tensors into one piece of memory, in the order in which a step reads them. Kernels then read it
front to back, and it is copied to another device at once."""

from collections.abc import Mapping

import torch

from loraplex_shard.device.memory import reserve
from loraplex_shard.shapes.adapter import AdapterWeights, LayerWeights

ALIGNMENT = 64  # bytes of a processor's cache line


def in_one_piece(layers: Mapping[str, LayerWeights], layer_count: int) -> AdapterWeights:
    """Copies these layers, which are on the CPU, into memory of their own."""
    memory = reserve(sum(_aligned(tensor.nbytes) for layer in layers.values() for tensor in layer.tensors))
    end = 0

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal end
        start, end = end, end + _aligned(tensor.nbytes)
        return memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    return AdapterWeights({name: layer.map(copy) for name, layer in layers.items()}, layer_count, memory)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
