"""Rotary position embedding (arXiv 2104.09864), in the half-split form of Llama's checkpoints."""

import torch


def rotate_(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotates queries or keys in place: heads [tokens, heads, head_dim].

    cos and sin [tokens, 1, head_dim] are those of each token's position, the first half of sin negated (see
    models/rope.py), in the dtype of `heads`.
    """
    first, second = heads.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    heads.mul_(cos).addcmul_(swapped, sin)
