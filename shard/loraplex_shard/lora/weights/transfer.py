"""Copies an adapter's weights from host memory to the device, on another stream than the one of the steps."""

import torch

from loraplex_protos.errors import OverloadedError
from loraplex_shard.shapes.adapter import AdapterWeights

PIECE = 2 << 20  # bytes: the GPU's memory is handed out in multiples of this


class Transfer:
    """Copies to one device. If that is the CPU, nothing is copied."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    def to_device(self, weights: AdapterWeights) -> AdapterWeights:
        """Copies the weights. Returns when the copy is complete, so a step may use it from any stream. Raises
        OverloadedError if the device has no memory for them: something else than adapters may have taken it.

        Host memory is not pinned. A copy of 80 MB of pageable memory takes about 10 ms. Pinning would round the size up
        and take the driver's lock, and the step's launches would wait for that.
        """
        if self._stream is None:
            return weights
        # The memory may have belonged to an evicted adapter that a step in progress still reads.
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                copy = weights.at(weights.memory.to(self._device))
        except torch.OutOfMemoryError as error:
            raise OverloadedError(
                f"the device has no memory for the adapter's {weights.size_bytes:,} bytes: something else takes it; "
                "try again later, or lower gpu_memory_fraction"
            ) from error
        self._stream.synchronize()
        return copy

    def bytes_on_device(self, weights: AdapterWeights) -> int:
        """What the weights take of the device's memory. On the CPU, that is the host memory, where they are already."""
        return weights.size_bytes if self._stream is None else -(-weights.size_bytes // PIECE) * PIECE
