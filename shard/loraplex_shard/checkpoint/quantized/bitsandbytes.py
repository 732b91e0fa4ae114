"""Matrices as bitsandbytes stores them, with its QuantState and its Linear8bitLt."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.checkpoint.quantized.integers import IntegerMatrix, groups
from loraplex_shard.checkpoint.quantized.stored import (
    FLOATS,
    Expected,
    Floats,
    StoredMatrix,
    as_slice,
    check,
    matrix_shape,
    modules,
)
from loraplex_shard.checkpoint.safetensors.files import SafetensorsFiles

STATE = ".quant_state.bitsandbytes__"
BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}  # that 4-bit matrices may be saved as
ROW_FORMAT = 0  # the format of int8 matrices; the other formats were made for the tensor cores of old GPUs


@dataclass(frozen=True, slots=True)
class Bitsandbytes:
    def find(self, files: SafetensorsFiles) -> dict[str, StoredMatrix]:
        states = {name.partition(STATE)[0]: name for name in files.names if STATE in name}
        four = {name: _four_bits(files, name, state) for name, state in states.items()}
        eight = {f"{module}.weight": _eight_bits(files, module) for module in modules(files, "SCB", *FLOATS)}
        return four | eight


@dataclass(frozen=True, slots=True)
class _FourBits:
    """A 4-bit matrix, row after row, with two weights in a byte; the first one is in the upper half. A weight is an
    index of `quant_map`, and the value there is multiplied by the block's `absmax`. These may be indices of another map
    themselves."""

    files: SafetensorsFiles
    name: str
    state: Mapping[str, Any]

    def read(self, rows: range, columns: range) -> Floats:
        _, width = self.state["shape"]
        first, last, size = rows.start * width, rows.stop * width, int(self.state["blocksize"])
        codes = self._bytes(first, last)
        codes = torch.stack((codes >> 4, codes & 15), dim=-1).flatten()[first % 2 :][: last - first]
        # There are few of these until each is repeated for the weights of its block.
        absmax = self._absmax(groups(range(first, last), size)).repeat_interleave(size)[first % size :][: last - first]
        weights = self.files.read(f"{self.name}.quant_map").float()[codes.int()].mul_(absmax)
        # bitsandbytes computes in float32 and rounds to this dtype, in whatever dtype the model is used.
        dtype = getattr(torch, self.state["dtype"])
        return Floats(weights.view(len(rows), width)[:, as_slice(columns)].to(dtype))

    def _bytes(self, first: int, last: int) -> torch.Tensor:
        """The bytes of weights `first` to `last`. They may be saved as numbers of several bytes."""
        size = self.files.read(self.name, slice(0, 1), slice(0, 1)).itemsize
        part = groups(range(first, last), 2 * size)
        lies = self.files.shape(self.name)[0] == 1  # early versions saved one row
        data = self.files.read(self.name, *((slice(None), part) if lies else (part,)))
        return data.flatten().view(torch.uint8)[first // 2 - part.start * size :]

    def _absmax(self, blocks: slice) -> torch.Tensor:
        absmax = self.files.read(f"{self.name}.absmax", blocks)
        if "nested_blocksize" not in self.state:
            return absmax.float()
        of = torch.arange(blocks.start, blocks.stop) // int(self.state["nested_blocksize"])
        nested = self.files.read(f"{self.name}.nested_absmax").float()[of]
        codes = self.files.read(f"{self.name}.nested_quant_map").float()[absmax.int()]
        return codes * nested + float(self.state["nested_offset"])


def _four_bits(files: SafetensorsFiles, name: str, state_name: str) -> StoredMatrix:
    try:
        state = json.loads(bytes(files.read(state_name).numpy()))
        (rows, columns), size = state["shape"], int(state["blocksize"])
        getattr(torch, state["dtype"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"tensor {state_name} is not a state of bitsandbytes: {error!r}") from error
    nested = "nested_blocksize" in state
    blocks = -(-rows * columns // size)
    expected = {
        "quant_map": Expected((16,), FLOATS),
        "absmax": Expected((blocks,), frozenset({"U8"}) if nested else FLOATS),
    }
    if nested:
        count = -(-blocks // int(state["nested_blocksize"]))
        expected |= {"nested_absmax": Expected((count,), FLOATS), "nested_quant_map": Expected((256,), FLOATS)}
    tensors = {f"{name}.{suffix}": tensor for suffix, tensor in expected.items()}
    check(files, (rows, columns), tensors)
    stored = prod(files.shape(name)) * BYTES.get(files.dtype(name), 0) if name in files.names else 0
    if stored != -(-rows * columns // 2):
        raise CheckpointError(
            f"tensor {name} has {stored} bytes, but a 4-bit matrix of {rows} by {columns} has {-(-rows * columns // 2)}"
        )
    names = frozenset(tensors) | {name, state_name}
    return StoredMatrix((rows, columns), names, in_integers=False, read_part=_FourBits(files, name, state).read)


def _eight_bits(files: SafetensorsFiles, module: str) -> StoredMatrix:
    """Symmetric int8 with a scale for each row. SCB is the row's largest weight."""
    weight, scale, layout = f"{module}.weight", f"{module}.SCB", f"{module}.weight_format"
    if weight not in files.names:
        raise CheckpointError(f"missing tensor {weight}")
    rows, columns = matrix_shape(files, weight)
    check(
        files, (rows, columns), {weight: Expected((rows, columns), frozenset({"I8"})), scale: Expected((rows,), FLOATS)}
    )
    if layout in files.names and int(files.read(layout)) != ROW_FORMAT:
        raise CheckpointError(
            f"tensor {layout}: only the format `row` is served: save the model with a new bitsandbytes"
        )

    def read(these: range, part: range) -> IntegerMatrix:
        values = files.read(weight, as_slice(these), as_slice(part)).contiguous().view(torch.uint8) ^ 128
        scales = files.read(scale, as_slice(these)).float()[:, None] / 127
        zeros = torch.full(scales.shape, 128, dtype=torch.uint8)
        return IntegerMatrix(8, columns, part.start, values, zeros, scales)

    return StoredMatrix((rows, columns), frozenset({weight, scale, layout}), in_integers=True, read_part=read)
