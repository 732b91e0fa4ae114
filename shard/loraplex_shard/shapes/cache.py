"""The paged KV cache of one rank, with the states of recurrent layers: only tensors. The router decides which sequence
owns which block and which row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex_shard.device.memory import reserve
from loraplex_shard.shapes.heads import Heads

# Dtypes whose numbers have a scale per position and head, and what the largest of them is scaled to.
SCALED = {torch.int8: 127.0, torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max}


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values.

    In memory, keys are transposed, so that the scores of a block's positions are neighbours, and the values of a head
    lie together. Or, if positions come first, both are [num_blocks, block_size, kv_heads, dim] in memory, and these are
    views of it.
    """

    keys: torch.Tensor  # [num_blocks, kv_heads, dim, block_size]
    values: torch.Tensor  # [num_blocks, kv_heads, block_size, value_dim]
    key_scales: torch.Tensor | None  # [num_blocks, kv_heads, block_size] float32, if the dtype is in SCALED
    value_scales: torch.Tensor | None

    @property
    def tensors(self) -> list[torch.Tensor]:
        every = self.keys, self.values, self.key_scales, self.value_scales
        return [tensor for tensor in every if tensor is not None]


@dataclass(frozen=True, slots=True)
class StateForm:
    """A tensor that a recurrent layer keeps for each sequence, whatever the sequence's length."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class KVCache:
    """Keys and values of all layers, in blocks of `block_size` token positions, and the states of recurrent layers, in
    `sequences` rows.

    `layers` are the heads of each layer. `dtype` is the model's dtype, or one of SCALED; then the key and the value of
    each position and head have a scale. `positions_first` is the form that the operations read. Memory that has not
    been written yet is only reserved, and its content is undefined.
    """

    def __init__(
        self,
        layers: Sequence[Heads],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        states: Sequence[StateForm] = (),
        sequences: int = 0,
        positions_first: bool = False,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # One more than the router has, for the padding of recorded passes.
        self.layers = tuple(
            _layer(heads, num_blocks + 1, block_size, dtype, device, positions_first) for heads in layers
        )
        self.states = tuple(_empty((sequences, *form.shape), form.dtype, device) for form in states)

    @property
    def spare_index(self) -> int:
        """A place for a key and a value that nobody reads."""
        return self.num_blocks * self.block_size

    @staticmethod
    def block_bytes(layers: Sequence[Heads], block_size: int, dtype: torch.dtype) -> int:
        """The size of one block in all layers, in bytes."""
        scales = 2 * torch.float32.itemsize if dtype in SCALED else 0
        head = sum(heads.kv * ((heads.dim + heads.value_dim) * dtype.itemsize + scales) for heads in layers)
        return block_size * head


def _layer(
    heads: Heads, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device, positions_first: bool
) -> LayerCache:
    positions = (num_blocks, heads.kv, block_size)
    if positions_first:
        keys, values = (
            _empty((num_blocks, block_size, heads.kv, dim), dtype, device) for dim in (heads.dim, heads.value_dim)
        )
        keys, values = keys.permute(0, 2, 3, 1), values.transpose(1, 2)
    else:
        keys = _empty((num_blocks, heads.kv, heads.dim, block_size), dtype, device)
        values = _empty((*positions, heads.value_dim), dtype, device)
    key_scales = value_scales = None
    if dtype in SCALED:
        key_scales, value_scales = torch.empty((2, *positions), dtype=torch.float32, device=device)
    return LayerCache(keys, values, key_scales, value_scales)


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return reserve(torch.Size(shape).numel() * dtype.itemsize).view(dtype).view(shape)
