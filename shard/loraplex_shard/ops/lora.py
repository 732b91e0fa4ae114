"""The LoRA delta of a batch in which each run of tokens has its own adapter: the torch reference.

Knows nothing of where adapters come from, and nothing of tensor parallelism: the weights were cut to fit the layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from loraplex_shard.batch import Segment


def add_lora_delta(out: torch.Tensor, x: torch.Tensor, segments: tuple[Segment, ...], name: str) -> None:
    """Adds scale * B(A x) to the layer's output `out` [tokens, out_features], in place.

    x is the layer's input [tokens, in_features], of the adapters' dtype and device; `name` is the layer's
    LinearLayout.name. Tokens outside the segments, and layers that an adapter does not touch, stay as they are. Each
    adapter is computed at its own lora_rank (LoRA: arXiv 2106.09685).
    """
    for segment in segments:
        layer = segment.adapter.layers.get(name)
        if layer is None:
            continue
        shrunk = x[segment.start : segment.stop] @ layer.shrink.T  # [tokens of the segment, stacked lora_ranks]
        expanded = out[segment.start : segment.stop]
        for e in layer.expansions:
            expanded[:, e.start : e.stop].addmm_(shrunk[:, e.rank_start : e.rank_stop], e.weight.T)
