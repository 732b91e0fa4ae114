"""Reads the tensors of llama.cpp's adapters (GGUF files)."""

from math import prod

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.checkpoint.gguf.file import GgufTensor, floats, read_content, read_header

# What llama.cpp's converter writes.
_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.Q8_0: torch.float32,
}


def read_tensors(data: memoryview) -> dict[str, torch.Tensor]:
    """Returns the tensors by name. Those that are not quantized are views of `data`. Raises AdapterInvalidError if the
    file is cut short or malformed, or if its tensors are quantized to less than 8 bits."""
    try:
        file = read_content(np.frombuffer(data, np.uint8), "the GGUF file")
        return {name: as_torch(name, tensor) for name, tensor in file.tensors.items()}
    except (CheckpointError, ValueError) as error:
        raise AdapterInvalidError(str(error)) from None


def read_shapes(beginning: memoryview, size: int) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file of `size` bytes without their values. Raises what read_tensors raises."""
    try:
        header = read_header(beginning, "the GGUF file")
    except CheckpointError as error:
        raise AdapterInvalidError(str(error)) from None
    for place in header.places:
        if header.data + place.end > size:
            raise AdapterInvalidError(f"the GGUF file is cut short: {place.name} ends after the end of the file")
    return {
        place.name: torch.empty(place.shape, dtype=_dtype(place.name, place.kind), device="meta")
        for place in header.places
    }


def as_torch(name: str, tensor: GgufTensor) -> torch.Tensor:
    """A view of the tensor's data, unless it is quantized. Raises AdapterInvalidError for other kinds."""
    dtype = _dtype(name, tensor.kind)
    if tensor.kind is GGMLQuantizationType.Q8_0:
        return floats(tensor.data, tensor.kind).view(tensor.shape)
    if not prod(tensor.shape):
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(tensor.data.reshape(-1), dtype=dtype).view(tensor.shape)


def _dtype(name: str, kind: GGMLQuantizationType) -> torch.dtype:
    if kind not in _DTYPES:
        known = ", ".join(each.name for each in _DTYPES)
        raise AdapterInvalidError(f"the GGUF file: {name[:200]} is in {kind.name}; only {known} are read")
    return _DTYPES[kind]
