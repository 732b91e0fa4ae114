"""Puts an adapter's tensors into one piece of memory, in the order in which a step reads them. Kernels then read it
front to back, and it is copied to another device at once."""

from collections.abc import Mapping

import torch

from loraplex_shard.device.memory import reserve, view_at
from loraplex_shard.shapes.adapter import AdapterWeights, LayerWeights
from loraplex_shard.shapes.classifier import Classifier
from loraplex_shard.shapes.own_weights import NOTHING, OwnWeights

ALIGNMENT = 64  # bytes of a processor's cache line


def in_one_piece(
    layers: Mapping[str, LayerWeights],
    layer_count: int,
    classifier: Classifier | None = None,
    own: OwnWeights = NOTHING,
) -> AdapterWeights:
    """Copies these layers, the classifier and what else the adapter has, all of which are on the CPU, into memory of
    their own."""
    tensors = [*(tensor for layer in layers.values() for tensor in layer.tensors), *own.tensors]
    tensors += [] if classifier is None else classifier.tensors
    memory = reserve(sum(_aligned(tensor.nbytes) for tensor in tensors))
    end = 0

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal end
        start, end = end, end + _aligned(tensor.nbytes)
        return view_at(memory, start, tensor.dtype, tensor.shape).copy_(tensor)

    held = {name: layer.map(copy) for name, layer in layers.items()}
    kept = own.map(copy)
    return AdapterWeights(held, layer_count, memory, None if classifier is None else classifier.map(copy), kept)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
