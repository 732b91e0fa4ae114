"""A step's batch as the CUDA kernels read it, and what it has in common with other steps."""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_shard.ops.cuda.lora import LoraTiles
from loraplex_shard.ops.cuda.runs import Runs
from loraplex_shard.ops.cuda.tiles import Cuts, Tiles, cut_batch
from loraplex_shard.ops.cuda.worklists import worklists
from loraplex_shard.shapes.batch import Batch
from loraplex_shard.shapes.heads import Heads

Kind = tuple[Heads, torch.dtype]  # attention with these heads, for queries of this dtype

# Numbers of tokens of recorded passes. With more tokens, a GPU computes for longer than the host launches.
BUCKETS = 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512
PARTS = 512, 4096  # room for short tiles, and for partial results
LEAST_WIDEST = 64
NOWHERE = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Form:
    """How much room a step's lists have. A recorded pass serves all steps of one form."""

    tokens: int
    parts: int
    long: bool  # whether there is room for long tiles: as many as tokens
    widest: int  # 0: there are no adapters
    int8: bool

    @classmethod
    def of(cls, tokens: int, runs: Runs, cuts: Iterable[Cuts]) -> "Form | None":
        """The least that a batch of so many tokens fits into; None if there is none."""
        needed, long = 0, False
        for each in cuts:
            needed, long = max(needed, len(each.short), each.partials), long or len(each.long) > 0
        if tokens > BUCKETS[-1] or needed > PARTS[-1]:
            return None
        ranks = max(LEAST_WIDEST, 1 << (runs.widest - 1).bit_length()) if len(runs.tiles) else 0
        return cls(_room(BUCKETS, tokens), _room(PARTS, needed), long, ranks, runs.int8)


def _room(rooms: tuple[int, ...], needed: int) -> int:
    """The least of them that suffices."""
    return rooms[bisect_left(rooms, needed)]


@dataclass(frozen=True, slots=True)
class CudaStep:
    batch: Batch
    lora: LoraTiles
    tiles: dict[Kind, Tiles]  # those of other kinds are made when they are first asked for
    form: Form | None  # None: the step is not like others

    @classmethod
    def of(cls, batch: Batch, runs: Runs, kinds: Iterable[Kind], device: torch.device, recordable: bool) -> "CudaStep":
        """`kinds`: those whose tiles are known to be needed. All lists are one copy to the device."""
        cuts = {kind: cut_batch(batch, *kind) for kind in kinds}
        form = Form.of(len(batch.token_ids), runs, cuts.values()) if recordable and cuts else None
        lora = runs.tiles
        lists: list[tuple[NDArray[Any], int]] = [(lora, form.tokens if form and form.widest else len(lora))]
        for each in cuts.values():
            lists.append((each.short, form.parts if form else len(each.short)))
            lists.append((each.long, form.tokens if form and form.long else len(each.long)))
            lists.append((each.split, form.tokens if form else len(each.split)))
        made = iter(worklists(lists, device))
        return cls(
            batch,
            LoraTiles(next(made), form.widest if form else runs.widest, runs.int8),
            {
                kind: Tiles(next(made), next(made), each.rows, next(made), form.parts if form else each.partials)
                for kind, each in cuts.items()
            },
            form,
        )

    def touches(self, layer: str) -> bool:
        """Whether adapters may touch the layer. A step without segments is a recorded one, for any adapters."""
        segments = self.batch.segments
        return self.lora.tiles.room > 0 and (not segments or any(layer in run.adapter.layers for run in segments))

    def with_room(self, spare: int) -> "CudaStep":
        """A copy in memory of its own, with as many tokens as the form has. The keys and values of those that are not
        the step's own are written to the cache index `spare`."""
        assert self.form is not None
        batch, tokens = self.batch, self.form.tokens
        copied = replace(
            batch,
            token_ids=batch.token_ids.new_zeros(tokens),
            positions=batch.positions.new_zeros(tokens),
            cache_indices=batch.cache_indices.new_empty(tokens),
            starts=NOWHERE,
            context_lengths=NOWHERE,
            rows=NOWHERE,
            segments=(),
        )
        tiles = {
            kind: replace(each, short=each.short.copy(), long=each.long.copy(), split=each.split.copy())
            for kind, each in self.tiles.items()
        }
        step = CudaStep(copied, replace(self.lora, tiles=self.lora.tiles.copy()), tiles, self.form)
        step.load(self, spare)
        return step

    def load(self, step: "CudaStep", spare: int) -> None:
        """Becomes another step of the form, in its own memory."""
        tokens = len(step.batch.token_ids)
        self.batch.cache_indices[tokens:] = spare
        theirs, ours = step._tensors(tokens), self._tensors(tokens)
        torch._foreach_copy_(ours[0], theirs[0])
        torch._foreach_copy_(ours[1], theirs[1])

    def _tensors(self, tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """All that differs between steps, int64 and int32."""
        batch = self.batch
        columns = [column[:tokens] for column in (batch.token_ids, batch.positions, batch.cache_indices)]
        lists = [each.numbers for tiles in self.tiles.values() for each in (tiles.short, tiles.long, tiles.split)]
        return [*columns, self.lora.tiles.numbers], lists
