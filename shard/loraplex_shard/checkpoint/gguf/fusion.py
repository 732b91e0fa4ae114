"""Reads tensors of transformers that are made of two tensors of llama.cpp, or that are transposed."""

from collections.abc import Sequence

import torch

from loraplex_shard.checkpoint.gguf.file import GgufTensor, floats
from loraplex_shard.checkpoint.gguf.origins import Fusion


def fused_shape(first: tuple[int, ...], fusion: Fusion) -> tuple[int, ...]:
    shape, axis = list(first), int(fusion.experts)
    shape[axis] *= 2 if fusion.second else 1
    return (*shape[:-2], shape[-1], shape[-2]) if fusion.transposed else tuple(shape)


def fused(tensors: Sequence[GgufTensor], fusion: Fusion, rows: slice, columns: slice) -> torch.Tensor:
    """Returns a part of the fused tensor's first two dimensions. If the first one is experts, only those that are asked
    for are read."""
    axis = int(fusion.experts)
    parts = [_part(tensor, rows if fusion.experts else slice(None)) for tensor in tensors]
    whole = torch.stack(parts, axis + 1).flatten(axis, axis + 1) if fusion.in_turns else torch.cat(parts, axis)
    whole = whole.transpose(1, 2) if fusion.transposed else whole
    return whole[:, columns] if fusion.experts else whole[rows, columns]


def _part(tensor: GgufTensor, first: slice) -> torch.Tensor:
    data = tensor.data.reshape(tensor.shape[0], -1, tensor.data.shape[1])[first]
    return floats(data.reshape(-1, data.shape[2]), tensor.kind).view(len(data), *tensor.shape[1:])
