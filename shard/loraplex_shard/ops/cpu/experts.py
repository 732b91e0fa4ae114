"""The operations of a mixture of experts on the CPU."""

from collections.abc import Sequence

import torch

from loraplex_shard.kernels.library import KINDS
from loraplex_shard.ops.base import Routing
from loraplex_shard.ops.cpu.kernel_calls import KernelCalls, address_of
from loraplex_shard.ops.cpu.step import SEGMENTS, CpuStep
from loraplex_shard.ops.cpu.weights import CpuWeight, ExpertWeights
from loraplex_shard.shapes.layout import LinearLayout


class CpuExpertOperations(KernelCalls):
    """The expert operations of loraplex_shard.ops.base.Operations, which has the docstrings."""

    def route(self, logits: torch.Tensor, chosen: int, normalized: bool) -> Routing:
        tokens, experts = logits.shape
        weights = self._empty((tokens * chosen,), torch.float32)
        order, places = (self._empty((tokens * chosen,), torch.int64) for _ in range(2))
        starts = self._empty((experts + 1,), torch.int64)
        self._call(
            "route",
            kind=KINDS[logits.dtype],
            tokens=tokens,
            experts=experts,
            chosen=chosen,
            normalized=normalized,
            logits=logits.data_ptr(),
            weights=weights.data_ptr(),
            order=order.data_ptr(),
            places=places.data_ptr(),
            starts=starts.data_ptr(),
        )
        return Routing(weights, order, places, starts, chosen)

    def dispatch(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        pairs, n = len(routing.order), x.shape[1]
        out = self._empty((pairs, n), x.dtype)
        self._call(
            "dispatch",
            threads=self._threads,
            kind=KINDS[x.dtype],
            pairs=pairs,
            chosen=routing.chosen,
            places=routing.places.data_ptr(),
            n=n,
            x=x.data_ptr(),
            out=out.data_ptr(),
        )
        return out

    def stack(self, weights: Sequence[CpuWeight], biases: Sequence[torch.Tensor | None]) -> ExpertWeights:
        return ExpertWeights(weights, biases)

    def expert_linear(self, x: torch.Tensor, routing: Routing, weight: ExpertWeights) -> torch.Tensor:
        n = weight.weights[0].rows
        out = self._empty((x.shape[0], n), x.dtype)
        self._call(
            "expert_linear",
            threads=self._threads,
            kind=KINDS[x.dtype],
            count=len(weight.weights),
            starts=routing.starts.data_ptr(),
            n=n,
            k=x.shape[1],
            x=x.data_ptr(),
            experts=weight.table.data_ptr(),
            out=out.data_ptr(),
        )
        return out

    def add_expert_lora_delta(
        self, out: torch.Tensor, x: torch.Tensor, step: CpuStep, routing: Routing, layouts: Sequence[LinearLayout]
    ) -> None:
        if not len(step.segments.starts) and self._recording is None:
            return
        count, starts, stops, tables, table_rows = (step[name] for name in SEGMENTS)
        self._call(
            "add_expert_lora_delta",
            threads=self._threads,
            kind=KINDS[x.dtype],
            int8_weights=step.segments.int8,
            segments=count,
            starts=starts,
            stops=stops,
            tables=tables,
            table_rows=table_rows,
            layer=layouts[0].index,
            count=len(layouts),
            expert_starts=routing.starts.data_ptr(),
            order=routing.order.data_ptr(),
            chosen=routing.chosen,
            x=x.data_ptr(),
            k=x.shape[1],
            out=out.data_ptr(),
            n=out.shape[1],
        )

    def combine(
        self, x: torch.Tensor, routing: Routing, shared: torch.Tensor | None = None, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        tokens, n = x.shape[0] // routing.chosen, x.shape[1]
        out = self._empty((tokens, n), x.dtype)
        self._call(
            "combine",
            threads=self._threads,
            kind=KINDS[x.dtype],
            tokens=tokens,
            chosen=routing.chosen,
            weights=routing.weights.data_ptr(),
            places=routing.places.data_ptr(),
            n=n,
            x=x.data_ptr(),
            shared=address_of(shared),
            gate=address_of(gate),
            out=out.data_ptr(),
        )
        return out
