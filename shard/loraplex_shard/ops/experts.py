"""The operations of a mixture of experts in plain torch, on any device, one expert after the other."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from loraplex_shard.ops.base import Routing, Segments, Weight
from loraplex_shard.shapes.batch import Segment
from loraplex_shard.shapes.layout import LinearLayout


class _Linears(Protocol):
    def linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor: ...

    def add_lora_delta(self, out: torch.Tensor, x: torch.Tensor, segments: Segments, layout: LinearLayout) -> None: ...


class ExpertOperations:
    """The expert operations of loraplex_shard.ops.base.Operations, which has the docstrings. They are for a class that
    implements `linear` and `add_lora_delta`."""

    def route(self, logits: torch.Tensor, chosen: int, normalized: bool) -> Routing:
        weights, experts = logits.float().softmax(-1).topk(chosen)
        if normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)
        chosen_by = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
        counts = chosen_by.index_add_(0, experts.flatten(), torch.ones_like(order))  # bincount waits for the device
        return Routing(weights.flatten(), order, order.argsort(), F.pad(counts.cumsum(0), (1, 0)), chosen)

    def dispatch(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        return x[routing.order // routing.chosen]

    def stack(
        self, weights: Sequence[Weight], biases: Sequence[torch.Tensor | None]
    ) -> list[tuple[Weight, torch.Tensor | None]]:
        return list(zip(weights, biases, strict=True))

    def expert_linear(
        self: _Linears, x: torch.Tensor, routing: Routing, weight: list[tuple[Weight, torch.Tensor | None]]
    ) -> torch.Tensor:
        runs = zip(pairwise(routing.starts.tolist()), weight, strict=True)
        return torch.cat([self.linear(x[start:stop], *own) for (start, stop), own in runs if start < stop])

    def add_expert_lora_delta(
        self: _Linears, out: torch.Tensor, x: torch.Tensor, step: Any, routing: Routing, layouts: Sequence[LinearLayout]
    ) -> None:
        segments = [each for each in step.batch.segments if len(each.adapter.table) > layouts[0].index]
        if not segments:
            return
        tokens = (routing.order // routing.chosen).tolist()
        for (first, end), layout in zip(pairwise(routing.starts.tolist()), layouts, strict=True):
            runs = []
            for segment in segments:
                start, stop = (bisect_left(tokens, each, first, end) for each in (segment.start, segment.stop))
                if start < stop:
                    runs.append(Segment(start, stop, segment.adapter))
            if runs:
                self.add_lora_delta(out, x, tuple(runs), layout)

    def combine(
        self, x: torch.Tensor, routing: Routing, shared: torch.Tensor | None = None, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        weighted = x[routing.places].float() * routing.weights[:, None]
        out = weighted.view(-1, routing.chosen, x.shape[1]).sum(1)
        if shared is not None:
            out += shared.float() if gate is None else shared.float() * gate.float().sigmoid()
        return out.to(x.dtype)
