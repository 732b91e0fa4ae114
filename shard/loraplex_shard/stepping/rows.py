"""The rows: a shard's state of each live sequence, and how plans change it.

A row can be recreated from one plan, and only plans change it. Counts are kept on the host, since they follow from the
plans alone; token ids are kept on the device, where sampling writes them. Block tables are on both: the device's get
new blocks only. Independent of the model, adapters and the meaning of sampling parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_protos.shard_pb2 import SequenceStart, StepRequest
from loraplex_shard.device.copies import to_device
from loraplex_shard.sampling.sampler import Bias
from loraplex_shard.sampling.stages import PARAMETERS, History, read_parameters
from loraplex_shard.shapes.batch import Batch, Segment

Ints = NDArray[np.int64]

# What a sequence wants reported in addition to tokens or (pool) instead of them.
DETAIL = np.dtype(
    [
        ("logprobs", np.bool_),
        ("top_logprobs", np.int64),
        ("prompt_logprobs", np.bool_),
        ("prompt_top_logprobs", np.int64),
        ("pool", np.bool_),
        ("classify", np.bool_),
    ]
)


@dataclass(frozen=True, slots=True)
class Chunks:
    """A plan's columns. Chunk i computes the positions [begins[i], ends[i]) of the sequence in row rows[i], which are
    the tokens [starts[i], starts[i + 1]) of the batch."""

    rows: Ints
    slots: Ints
    samples: NDArray[np.bool_]
    begins: Ints
    ends: Ints
    starts: Ints  # chunks + 1
    new_blocks: Ints  # entries of the flattened block tables that are new with the plan
    score_begins: Ints  # the tokens [score_begins[i], score_ends[i]) of the sequence are unscored, and follow positions
    score_ends: Ints  # of the chunk: it makes their logprobs known

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Where a step's samples come from and go to, on the device, [n] int64 each."""

    tokens: torch.Tensor  # of the batch: the sample follows this one
    rows: torch.Tensor
    positions: torch.Tensor


class Rows:
    """The rows of one rank. An AssertionError means that the router sent a plan that does not fit them."""

    def __init__(
        self,
        max_sequences: int,
        max_model_len: int,
        vocab_size: int,
        block_size: int,
        num_blocks: int,
        device: torch.device,
    ) -> None:
        self._vocab_size = vocab_size
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._max_model_len = max_model_len
        self._device = device
        # Only [row, :known[row]] is ever used, so it starts uninitialised. A token sampled after the model's last
        # position needs a place too.
        self._tokens = torch.empty((max_sequences, max_model_len + 1), dtype=torch.int32, device=device)
        self._known: Ints = np.zeros(max_sequences, np.int64)  # tokens, sampled ones included; 0: the row is free
        self.prompt_lengths: Ints = np.zeros(max_sequences, np.int64)
        self.sampling = np.zeros(max_sequences, PARAMETERS)
        self._biased = np.zeros(max_sequences, np.bool_)
        self._biases: dict[int, tuple[Ints, NDArray[np.float32]]] = {}  # by row: token ids and their biases
        self.detail = np.zeros(max_sequences, DETAIL)
        self.void = np.zeros(max_sequences, np.bool_)  # started with a token that is not in the vocabulary
        self.forceable = np.zeros(max_sequences, np.bool_)  # rows whose grammars may add tokens that are not sampled
        # Tokens whose logprobs need not be reported any more: all but fast-forward tokens of a row which asked for
        # logprobs and still follow positions that are to be computed.
        self._scored: Ints = np.zeros(max_sequences, np.int64)
        self._computed: Ints = np.zeros(max_sequences, np.int64)  # positions whose keys and values are in the cache
        self._block_tables = np.zeros((max_sequences, -(-max_model_len // block_size)), np.int32)
        # Its own memory on a GPU, the same on a CPU.
        (self._tables_on_device,) = to_device([self._block_tables], device)
        self._block_counts: Ints = np.zeros(max_sequences, np.int64)

    def clear(self) -> None:
        """Forgets all sequences."""
        self._known[:] = 0

    def start(self, start: SequenceStart) -> None:
        """Lets a sequence take over its row. A sequence with a token that the model does not have is void: it is
        computed with token 0 instead, so that its plans fit, and its results must be dropped."""
        row, known = start.row, len(start.tokens)
        assert row < len(self._known), f"row {row} of {len(self._known)}"
        assert 0 < start.prompt_length <= known <= self._max_model_len, f"row {row}: {known} tokens"
        assert start.computed < known, f"row {row}: nothing left to compute"
        tokens = np.fromiter(start.tokens, np.int64, known)
        bias = start.sampling.logit_bias
        biased = np.fromiter(bias.keys(), np.int64, len(bias))
        size = start.vocab_size or self._vocab_size
        self.void[row] = (tokens >= size).any() or (biased >= size).any()
        if self.void[row]:
            tokens[tokens >= size] = biased[biased >= size] = 0
        (self._tokens[row, :known],) = to_device([tokens.astype(np.int32)], self._device)
        self._known[row] = known
        self.prompt_lengths[row] = start.prompt_length
        self.sampling[row] = read_parameters(start.sampling)
        self._biased[row] = bool(bias)
        if self._biased[row]:
            values = np.fromiter(bias.values(), np.float32, len(bias))
            self._biases[row] = biased, values
        self.detail[row] = tuple(getattr(start, name) for name in DETAIL.names or ())
        assert 0 <= start.unscored <= known - start.prompt_length, f"row {row}: unscored prompt tokens"
        self.forceable[row] = start.HasField("grammar")
        self._scored[row] = known - start.unscored
        self._computed[row] = start.computed
        self._block_counts[row] = 0

    def advance(self, plan: StepRequest) -> Chunks:
        """Marks a plan's chunks as computed and their samples as known; the values follow with the step."""
        rows, lengths = _column(plan.rows), _column(plan.lengths)
        slots, samples, block_counts = _column(plan.slots), _column(plan.samples) != 0, _column(plan.block_counts)
        count = len(rows)
        assert all(len(column) == count for column in (lengths, slots, samples, block_counts)), "columns differ"
        assert (rows < len(self._known)).all() and len(np.unique(rows)) == count, "rows unknown or twice"
        begins = self._computed[rows]
        ends = begins + lengths
        assert (lengths > 0).all() and (ends <= self._known[rows]).all(), "chunk past the known tokens"
        assert (ends <= self._max_model_len).all(), "chunk past the model's context"
        known = self._known[rows]
        at_end = ends == known
        assert (at_end | self.forceable[rows])[samples].all(), "sample before the last known token"
        samples &= at_end  # the router did not know the forced tokens yet
        new_blocks = self._append_blocks(rows, block_counts, _column(plan.blocks))
        assert (self._block_counts[rows] * self._block_size >= ends).all(), "chunk past its blocks"
        self._computed[rows] = ends
        self._known[rows] += samples
        score_begins, score_ends = np.maximum(begins + 1, self._scored[rows]), np.minimum(ends + 1, known)
        self._scored[rows] = np.maximum(self._scored[rows], score_ends + samples)
        starts = np.concatenate(([0], np.cumsum(lengths)))
        score_ends = np.maximum(score_ends, score_begins)
        return Chunks(rows, slots, samples, begins, ends, starts, new_blocks, score_begins, score_ends)

    def batch(self, chunks: Chunks, segments: tuple[Segment, ...]) -> tuple[Batch, Sampled]:
        """The tensors of a step, of which advance() made the chunks. All of them are one copy to the device."""
        lengths, last = chunks.ends - chunks.begins, chunks.starts[1:] - 1
        positions = spans(chunks.begins, lengths)
        token_rows = np.repeat(chunks.rows, lengths)
        blocks = self._block_tables[token_rows, positions // self._block_size].astype(np.int64)
        sampling = chunks.samples
        columns = (
            token_rows,
            positions,
            blocks * self._block_size + positions % self._block_size,
            last[sampling],
            chunks.rows[sampling],
            chunks.ends[sampling],
            chunks.new_blocks,
            self._block_tables.reshape(-1)[chunks.new_blocks],
        )
        rows, at, indices, *sampled, new, new_blocks = to_device(columns, self._device)
        if len(chunks.new_blocks):
            self._tables_on_device.view(-1)[new] = new_blocks
        batch = Batch(
            token_ids=self._tokens[rows, at].long(),
            positions=at,
            cache_indices=indices,
            starts=tuple(chunks.starts.tolist()),
            context_lengths=tuple(chunks.ends.tolist()),
            rows=tuple(chunks.rows.tolist()),
            block_tables=self._tables_on_device,
            segments=segments,
        )
        return batch, Sampled(*sampled)

    def tokens_at(self, rows: Ints, positions: Ints) -> torch.Tensor:
        """One token per (row, position): [n] int64 on the device."""
        there, at = to_device([rows, positions], self._device)
        return self._tokens[there, at].long()

    def history(self, rows: Ints, lengths: Ints) -> History:
        """The tokens of these rows, up to these lengths, for the sampler."""
        return History(self._tokens, rows, self.prompt_lengths[rows], lengths)

    def bias(self, rows: Ints) -> Bias | None:
        """The logit biases of these rows, if any."""
        places = np.flatnonzero(self._biased[rows]).tolist()
        if not places:
            return None
        ids, values = zip(*(self._biases[rows[place]] for place in places), strict=True)
        counts = [len(part) for part in ids]
        columns = np.repeat(places, counts), np.concatenate(ids), np.concatenate(values)
        return Bias(*to_device(columns, self._device))

    def record(self, sampled: Sampled, tokens: torch.Tensor) -> None:
        """Appends sampled tokens [n] int64, one per row."""
        self._tokens[sampled.rows, sampled.positions] = tokens.int()

    def room(self, rows: Ints) -> Ints:
        """How many more tokens these rows have room for."""
        return self._max_model_len - self._known[rows]

    def scores(self, rows: Ints) -> NDArray[np.bool_]:
        """Which of these rows asked for logprobs."""
        detail = self.detail[rows]
        scored: NDArray[np.bool_] = detail["logprobs"] | (detail["top_logprobs"] > 0)
        return scored

    def fast_forward(self, rows: Ints, tokens: torch.Tensor) -> None:
        """Appends fast-forward tokens [n, most] int64, padded with -1, to these rows.

        Later chunks score them if logprobs were requested.
        """
        counts: Ints = (tokens >= 0).sum(1).cpu().numpy()
        positions = spans(self._known[rows], counts)
        there, at = to_device([np.repeat(rows, counts), positions], self._device)
        self._tokens[there, at] = tokens[tokens >= 0].int()
        self._known[rows] += counts
        self._scored[rows] += np.where(self.scores(rows), 0, counts)

    def _append_blocks(self, rows: Ints, counts: Ints, blocks: Ints) -> Ints:
        """Returns the places of the blocks in the flattened tables."""
        assert counts.sum() == len(blocks) and (blocks < self._num_blocks).all(), "blocks out of range"
        begins = self._block_counts[rows]
        assert (begins + counts <= self._block_tables.shape[1]).all(), "more blocks than the model's context has"
        places: Ints = np.repeat(rows, counts) * self._block_tables.shape[1] + spans(begins, counts)
        self._block_tables.reshape(-1)[places] = blocks
        self._block_counts[rows] += counts
        return places


def spans(firsts: Ints, counts: Ints) -> Ints:
    """For each i in turn, counts[i] numbers starting at firsts[i]."""
    numbers: Ints = np.arange(counts.sum()) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)
    return numbers


def _column(values: Sequence[int] | Sequence[bool]) -> Ints:
    return np.fromiter(values, np.int64, len(values))
