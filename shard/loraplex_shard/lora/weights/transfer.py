"""Copies an adapter's weights from host memory to the device, beside the stream on which steps run."""

import torch

from loraplex_shard.shapes.adapter import AdapterWeights


class Transfer:
    """To one device. Where that is the CPU, host and device are the same memory and nothing moves."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    def to_device(self, weights: AdapterWeights) -> AdapterWeights:
        """Returns when the copy is complete, so that a step may use it from any stream.

        Host memory is not pinned: one copy of pageable memory takes some 10 ms for 80 MB, while pinning it would take
        the driver's lock, for which the step's launches would wait, and round its size up.
        """
        if self._stream is None:
            return weights
        # The memory may have been that of an adapter that left, and which a step under way still reads.
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy = weights.at(weights.memory.to(self._device))
        self._stream.synchronize()
        return copy
