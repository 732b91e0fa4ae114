"""Moves an adapter's weights between host and device, beside the stream on which steps run."""

from collections.abc import Callable
from dataclasses import replace

import torch

from loraplex_shard.lora.weights import AdapterWeights, LayerWeights


class Transfer:
    """To and from one device. Where that is the CPU, host and device are the same memory and nothing moves."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    def to_host(self, weights: AdapterWeights) -> AdapterWeights:
        """Weights on the CPU -> the same in memory from which copies to the device are fast."""
        return weights if self._stream is None else _mapped(weights, torch.Tensor.pin_memory)

    def to_device(self, weights: AdapterWeights) -> AdapterWeights:
        """Returns when the copy is complete, so that a step may use it from any stream."""
        if self._stream is None:
            return weights
        with torch.cuda.stream(self._stream):
            copy = _mapped(weights, lambda tensor: tensor.to(self._device, non_blocking=True))
        self._stream.synchronize()
        return copy


def _mapped(weights: AdapterWeights, function: Callable[[torch.Tensor], torch.Tensor]) -> AdapterWeights:
    layers = {}
    for name, layer in weights.layers.items():
        expansions = tuple(replace(e, weight=function(e.weight)) for e in layer.expansions)
        scales = None if layer.scales is None else function(layer.scales)
        layers[name] = LayerWeights(layer.index, function(layer.shrink), expansions, scales)
    return AdapterWeights(layers, weights.layer_count)
