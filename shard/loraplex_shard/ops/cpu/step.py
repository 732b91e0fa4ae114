"""A step's batch as the CPU's kernels read it."""

from dataclasses import dataclass

import numpy as np

from loraplex_shard.ops.cpu.program import StepNumber
from loraplex_shard.shapes.batch import Batch, Segment

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]
Table = np.ndarray[tuple[int, int], np.dtype[np.int64]]

SEGMENTS = ("segments", "segment_starts", "segment_stops", "segment_adapters", "segment_table_rows")

# The numbers that recorded calls take from a step, in the order of CpuStep.numbers.
STEP = (
    "tokens",
    "positions",
    "indices",
    "chunks",
    "starts",
    "contexts",
    "rows",
    "tables",
    "table_width",
    *SEGMENTS,
    "own_norms",
    "own_embeddings",
)


@dataclass(frozen=True, slots=True)
class CpuSegments:
    """Segments as kernels read them: runs of rows that use the same adapter."""

    starts: Ints
    stops: Ints
    tables: Ints  # addresses of the adapters' tables
    table_rows: Ints  # rows of each table
    int8: bool

    @classmethod
    def of(cls, segments: tuple[Segment, ...]) -> "CpuSegments":
        return cls(
            np.array([segment.start for segment in segments], np.int64),
            np.array([segment.stop for segment in segments], np.int64),
            np.array([segment.adapter.table.data_ptr() for segment in segments], np.int64),
            np.array([len(segment.adapter.table) for segment in segments], np.int64),
            any(segment.adapter.int8 for segment in segments),
        )

    @property
    def numbers(self) -> tuple[int, ...]:
        columns = self.starts, self.stops, self.tables, self.table_rows
        return len(self.starts), *(column.ctypes.data for column in columns)


class CpuStep:
    """A batch as kernels read it. `numbers` has the values of STEP. The step keeps the arrays that they point to."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.starts, self.contexts, self.rows = batch.starts, batch.context_lengths, batch.rows
        self.segments = CpuSegments.of(batch.segments)
        self.own_norms, self.own_embeddings = _own_weights(batch)
        self.numbers = (
            batch.token_ids.data_ptr(),
            batch.positions.data_ptr(),
            batch.cache_indices.data_ptr(),
            len(self.contexts),
            self.starts.ctypes.data,
            self.contexts.ctypes.data,
            self.rows.ctypes.data,
            batch.block_tables.data_ptr(),
            batch.block_tables.shape[1],
            *self.segments.numbers,
            0 if self.own_norms is None else self.own_norms.ctypes.data,
            0 if self.own_embeddings is None else self.own_embeddings.ctypes.data,
        )

    def __getitem__(self, name: str) -> StepNumber:
        place = STEP.index(name)
        return StepNumber(self.numbers[place], place)


def _own_weights(batch: Batch) -> tuple[Table | None, Ints | None]:
    """The addresses of what the tokens' adapters have of their own: parameters of norms [parameters, tokens] and
    embeddings [tokens]. 0 stands for nothing, None for nothing in any adapter."""
    norms, embeddings, tokens = None, None, len(batch.token_ids)
    for segment in batch.segments:
        own = segment.adapter.own
        if own.norms:
            norms = np.zeros((len(own.norms), tokens), np.int64) if norms is None else norms
            norms[:, segment.start : segment.stop] = own.norm_table.numpy()[:, None]
        if own.embedding is not None:
            embeddings = np.zeros(tokens, np.int64) if embeddings is None else embeddings
            embeddings[segment.start : segment.stop] = own.embedding.table.data_ptr()
    return norms, embeddings
