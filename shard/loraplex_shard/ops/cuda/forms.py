"""The forms of steps, and the memory that all steps of a form have in common. A recorded pass reads all that differs
between steps from there."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_shard.device.copies import ALIGNMENT
from loraplex_shard.device.memory import view_at
from loraplex_shard.ops.cuda.lora import LoraTiles
from loraplex_shard.ops.cuda.runs import Runs
from loraplex_shard.ops.cuda.step import CudaStep, Kind
from loraplex_shard.ops.cuda.tiles import Cuts, Tiles
from loraplex_shard.ops.cuda.worklists import Worklist
from loraplex_shard.shapes.batch import NONE, Batch, Inputs

# Numbers of tokens of recorded passes. With more tokens, a GPU computes for longer than the host launches.
BUCKETS = 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512
PARTS = 512, 4096  # room for short tiles, and for partial results
LEAST_WIDEST = 256  # room for ranks: r=64 for query, key and value. It only takes memory

TORCH = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


@dataclass(frozen=True, slots=True)
class Form:
    """How much room a step's lists have. A recorded pass serves all steps of one form."""

    tokens: int
    parts: int
    long: bool  # whether there is room for long tiles: as many as tokens
    widest: int  # 0: there are no adapters
    int8: bool
    sampled: bool  # whether a token is drawn after each token

    @classmethod
    def of(cls, inputs: Inputs, runs: Runs, cuts: Mapping[Kind, Cuts]) -> "Form | None":
        """The least that the inputs fit into; None if there is none."""
        needed, long = 0, False
        for each in cuts.values():
            needed, long = max(needed, len(each.short), each.partials), long or len(each.long) > 0
        if len(inputs) > BUCKETS[-1] or needed > PARTS[-1]:
            return None
        ranks = max(LEAST_WIDEST, 1 << (runs.widest - 1).bit_length()) if runs.key else 0
        sampled = inputs.draws is not None and not runs.own_heads
        return cls(_room(BUCKETS, len(inputs)), _room(PARTS, needed), long, ranks, runs.int8, sampled)


def _room(rooms: tuple[int, ...], needed: int) -> int:
    """The least of them that suffices."""
    return rooms[bisect_left(rooms, needed)]


@dataclass(frozen=True, slots=True)
class FormStep:
    """A step whose tensors are views of a form's memory."""

    cuda: CudaStep
    token_rows: torch.Tensor
    new_places: torch.Tensor
    new_blocks: torch.Tensor
    draws: Sequence[torch.Tensor]  # the columns of Draws; none if nothing is drawn


class Layout:
    """What lies where in the memory of a form's steps."""

    def __init__(self, form: Form, rows_of_long_tiles: Mapping[Kind, int]) -> None:
        self.form, self._rows = form, rows_of_long_tiles
        tokens, parts = form.tokens, form.parts
        lists = [((parts, 7), np.int32), ((tokens if form.long else 0, 7), np.int32), ((tokens, 4), np.int32)]
        kinds: list[Any] = [np.float32, np.int64, np.float32, np.float32, np.float64] if form.sampled else []
        arrays: list[tuple[tuple[int, ...], Any]] = [
            ((5, tokens), np.int64),
            ((1 + 3 * len(self._rows),), np.int32),
            ((tokens if form.widest else 0, 3), np.int64),
            *lists * len(self._rows),
            *(((tokens,), kind) for kind in kinds),
        ]
        self._arrays = [(shape, np.dtype(kind)) for shape, kind in arrays]
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._arrays]
        *self._begins, self.size = accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0)

    def fill(self, inputs: Inputs, runs: Runs, cuts: Mapping[Kind, Cuts], spare: int, pinned: bool) -> torch.Tensor:
        """A step's numbers on the host. `spare`: where the keys and values of what is not the step's own are written.
        All new blocks must fit into the form."""
        memory = torch.empty(self.size, dtype=torch.uint8, pin_memory=pinned)
        columns, counts, *lists = self._views(memory.numpy())
        tokens, new = len(inputs), len(inputs.new_places)
        nobody = len(inputs.block_tables) - 1
        columns[0, :tokens], columns[0, tokens:] = inputs.token_rows, nobody
        columns[1, :tokens], columns[1, tokens:] = inputs.positions, 0
        columns[2, :tokens], columns[2, tokens:] = inputs.cache_indices, spare
        columns[3, :new], columns[3, new:] = inputs.new_places, nobody * inputs.block_tables.shape[1]
        columns[4, :new], columns[4, new:] = inputs.new_blocks, 0
        given: list[NDArray[Any]] = [runs.tiles]
        for each in cuts.values():
            given += each.short, each.long, each.split
        counts[:] = [len(entries) for entries in given]
        for entries, room in zip(given, lists[: len(counts)], strict=True):
            room[: len(entries)] = entries
        if self.form.sampled and inputs.draws is not None:
            for column, room in zip(inputs.draws.columns(), lists[len(counts) :], strict=True):
                room[:tokens], room[tokens:] = column, 0  # a temperature of 0: nothing is drawn
        return memory

    def step(self, memory: torch.Tensor, inputs: Inputs) -> FormStep:
        """The step in a copy of such memory on the device."""
        columns, counts, *lists = (
            view_at(memory, begin, TORCH[dtype], shape)
            for begin, (shape, dtype) in zip(self._begins, self._arrays, strict=True)
        )
        token_rows, positions, cache_indices, new_places, new_blocks = columns
        work = [Worklist(entries, counts[number : number + 1]) for number, entries in enumerate(lists[: len(counts)])]
        tiles = {
            kind: Tiles(work[place], work[place + 1], rows, work[place + 2], self.form.parts)
            for place, (kind, rows) in zip(range(1, len(work), 3), self._rows.items(), strict=True)
        }
        batch = Batch(
            torch.zeros_like(positions), positions, cache_indices, NONE, NONE, NONE, inputs.block_tables, segments=()
        )
        cuda = CudaStep(batch, LoraTiles(work[0], self.form.widest, self.form.int8), tiles)
        return FormStep(cuda, token_rows, new_places, new_blocks, lists[len(counts) :])

    def _views(self, memory: NDArray[np.uint8]) -> list[NDArray[Any]]:
        return [
            np.ndarray(shape, dtype, memory.data, begin)
            for begin, (shape, dtype) in zip(self._begins, self._arrays, strict=True)
        ]
