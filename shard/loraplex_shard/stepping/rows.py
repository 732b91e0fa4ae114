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
from loraplex_shard.sampling.draws import Draws
from loraplex_shard.sampling.sampler import Bias
from loraplex_shard.sampling.stages import History, read_parameters
from loraplex_shard.shapes.batch import NONE, Inputs, Segment
from loraplex_shard.stepping.lineup import DETAIL, START, Ints, Lineup, SampledChunks


@dataclass(frozen=True, slots=True)
class Chunks:
    """What a plan computes: the positions [begins[i], ends[i]) of the sequence in the row of chunk i."""

    lineup: Lineup
    begins: Ints
    ends: Ints
    new_places: Ints  # entries of the flattened block tables that are new with the plan
    new_blocks: Ints  # what is there
    # The tokens [first, stop) of each chunk's sequence that are unscored and follow positions of the chunk: it makes
    # their logprobs known. None: there are none in any.
    scored: tuple[Ints, Ints] | None

    def __len__(self) -> int:
        return len(self.lineup)


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
        # position needs a place too. The last row is nobody's, here and in the block tables.
        self._tokens = torch.empty((max_sequences + 1, max_model_len + 1), dtype=torch.int32, device=device)
        self._tokens[-1, 0] = 0
        self._known: Ints = np.zeros(max_sequences, np.int64)  # tokens, sampled ones included; 0: the row is free
        self._starts = np.zeros(max_sequences, START)
        self._biases: dict[int, tuple[Ints, NDArray[np.float32]]] = {}  # by row: token ids and their biases
        # How many of the last tokens are still to be reported with their logprobs: fast-forward tokens of a row which
        # asked for logprobs, that follow positions which are to be computed.
        self._unscored: Ints = np.zeros(max_sequences, np.int64)
        self._computed: Ints = np.zeros(max_sequences, np.int64)  # positions whose keys and values are in the cache
        self._block_tables = np.zeros((max_sequences + 1, -(-max_model_len // block_size)), np.int32)
        # Its own memory on a GPU, the same on a CPU.
        (self._tables_on_device,) = to_device([self._block_tables], device)
        self._block_counts: Ints = np.zeros(max_sequences, np.int64)
        self._last: tuple[Sequence[Sequence[int]], Lineup] | None = None  # a plan's columns, if no row started since

    def clear(self) -> None:
        """Forgets all sequences."""
        self._known[:] = 0
        self._last = None

    def start(self, start: SequenceStart) -> None:
        """Lets a sequence take over its row. A sequence with a token that the model does not have is void: it is
        computed with token 0 instead, so that its plans fit, and its results must be dropped."""
        row, known = start.row, len(start.tokens)
        assert row < len(self._known), f"row {row} of {len(self._known)}"
        assert 0 < start.prompt_length <= known <= self._max_model_len, f"row {row}: {known} tokens"
        assert start.computed < known, f"row {row}: nothing left to compute"
        assert 0 <= start.unscored <= known - start.prompt_length, f"row {row}: unscored prompt tokens"
        tokens = np.fromiter(start.tokens, np.int64, known)
        bias = start.sampling.logit_bias
        biased = np.fromiter(bias.keys(), np.int64, len(bias))
        size = start.vocab_size or self._vocab_size
        void = bool((tokens >= size).any() or (biased >= size).any())
        if void:
            tokens[tokens >= size] = biased[biased >= size] = 0
        (self._tokens[row, :known],) = to_device([tokens.astype(np.int32)], self._device)
        if bias:
            values = np.fromiter(bias.values(), np.float32, len(bias))
            self._biases[row] = biased, values
        narrowing = start.min_new_tokens, start.unwanted_token_ids, start.allowed_token_ids, start.bad_words
        has_grammar = start.HasField("grammar")
        self._starts[row] = (
            start.prompt_length,
            void,
            has_grammar,
            has_grammar or any(narrowing),
            bool(bias),
            tuple(getattr(start, name) for name in DETAIL.names or ()),
            read_parameters(start.sampling),
        )
        self._known[row] = known
        self._unscored[row] = start.unscored
        self._computed[row] = start.computed
        self._block_counts[row] = 0
        self._last = None

    def advance(self, plan: StepRequest) -> Chunks:
        """Marks a plan's chunks as computed and their samples as known; the values follow with the step."""
        lineup = self._lineup(plan)
        rows = lineup.rows
        begins, known = self._computed[rows], self._known[rows]
        ends = begins + lineup.lengths
        assert (ends <= known).all(), "chunk past the known tokens"
        assert (ends <= self._max_model_len).all(), "chunk past the model's context"
        early = (ends < known) & lineup.samples
        if early.any():
            assert lineup.starts["forceable"][early].all(), "sample before the last known token"
            # The router did not know the forced tokens yet.
            lineup = Lineup(rows, lineup.lengths, lineup.slots, lineup.samples & ~early, lineup.starts)
        new_places, new_blocks = self._append_blocks(rows, plan)
        assert (self._block_counts[rows] * self._block_size >= ends).all(), "chunk past its blocks"
        self._computed[rows] = ends
        self._known[rows] = known + lineup.samples
        return Chunks(lineup, begins, ends, new_places, new_blocks, self._score(lineup, begins, ends, known))

    def inputs(self, chunks: Chunks, segments: tuple[Segment, ...]) -> Inputs:
        """What a model is to compute, of which advance() made the chunks."""
        lineup, sampled = chunks.lineup, chunks.lineup.sampled
        rows = lineup.rows_of_tokens
        positions = chunks.begins if len(rows) == len(chunks) else spans(chunks.begins, lineup.lengths)
        blocks, offsets = np.divmod(positions, self._block_size)
        draws = None
        if len(sampled) == len(rows):
            draws = Draws(sampled.numbers, chunks.ends - sampled.starts["prompt_length"])
        return Inputs(
            rows,
            positions,
            self._block_tables[rows, blocks].astype(np.int64) * self._block_size + offsets,
            lineup.offsets,
            chunks.ends,
            lineup.rows,
            self._tokens,
            self._tables_on_device,
            segments,
            chunks.new_places,
            chunks.new_blocks,
            draws,
        )

    def tokens_at(self, rows: Ints, positions: Ints) -> torch.Tensor:
        """One token per (row, position): [n] int64 on the device."""
        there, at = to_device([rows, positions], self._device)
        return self._tokens[there, at].long()

    def history(self, sampled: SampledChunks, lengths: Ints) -> History:
        """The tokens of these sequences, up to these lengths, for the sampler."""
        return History(self._tokens, sampled.rows, sampled.starts["prompt_length"], lengths)

    def bias(self, sampled: SampledChunks) -> Bias | None:
        """The logit biases of these sequences, if any."""
        places = sampled.biased
        if not len(places):
            return None
        ids, values = zip(*(self._biases[row] for row in sampled.rows[places].tolist()), strict=True)
        counts = [len(part) for part in ids]
        columns = np.repeat(places, counts), np.concatenate(ids), np.concatenate(values)
        return Bias(*to_device(columns, self._device))

    def record(self, chunks: Chunks, tokens: torch.Tensor) -> None:
        """Appends the tokens [n] int64 that were sampled after the chunks."""
        sampled = chunks.lineup.sampled
        rows, positions = to_device([sampled.rows, chunks.ends[sampled.places]], self._device)
        self._tokens[rows, positions] = tokens.int()

    def room(self, row: int) -> int:
        """How many more tokens the row has room for."""
        return self._max_model_len - int(self._known[row])

    def fast_forward(self, sampled: SampledChunks, tokens: torch.Tensor) -> None:
        """Appends fast-forward tokens [n, most] int64, padded with -1, to these rows.

        Later chunks score them if logprobs were requested.
        """
        rows = sampled.rows
        counts: Ints = (tokens >= 0).sum(1).cpu().numpy()
        positions = spans(self._known[rows], counts)
        there, at = to_device([np.repeat(rows, counts), positions], self._device)
        self._tokens[there, at] = tokens[tokens >= 0].int()
        self._known[rows] += counts
        self._unscored[rows] += np.where(sampled.scored, counts, 0)

    def _lineup(self, plan: StepRequest) -> Lineup:
        """The last plan's, if this one has the same columns and nothing starts with it."""
        columns = plan.rows[:], plan.lengths[:], plan.slots[:], plan.samples[:]
        if self._last is not None and self._last[0] == columns:
            return self._last[1]
        rows, lengths, slots, samples = (np.fromiter(column, np.int64, len(column)) for column in columns)
        assert len(rows) == len(lengths) == len(slots) == len(samples), "columns differ"
        assert (rows < len(self._known)).all() and len(np.unique(rows)) == len(rows), "rows unknown or twice"
        assert (lengths > 0).all(), "a chunk without tokens"
        lineup = Lineup(rows, lengths, slots, samples != 0, self._starts[rows])
        self._last = columns, lineup
        return lineup

    def _append_blocks(self, rows: Ints, plan: StepRequest) -> tuple[Ints, Ints]:
        """Returns the places of the new blocks in the flattened tables, and the blocks."""
        assert len(plan.block_counts) == len(rows), "columns differ"
        if not plan.blocks:
            assert not any(plan.block_counts), "blocks are missing"
            return NONE, NONE
        counts = np.fromiter(plan.block_counts, np.int64, len(rows))
        blocks = np.fromiter(plan.blocks, np.int64, len(plan.blocks))
        assert counts.sum() == len(blocks) and (blocks < self._num_blocks).all(), "blocks out of range"
        begins = self._block_counts[rows]
        assert (begins + counts <= self._block_tables.shape[1]).all(), "more blocks than the model's context has"
        places: Ints = np.repeat(rows, counts) * self._block_tables.shape[1] + spans(begins, counts)
        self._block_tables.reshape(-1)[places] = blocks
        self._block_counts[rows] += counts
        return places, blocks

    def _score(self, lineup: Lineup, begins: Ints, ends: Ints, known: Ints) -> tuple[Ints, Ints] | None:
        """Marks unscored tokens that follow positions of the chunks as scored. Returns which they are."""
        unscored = self._unscored[lineup.rows]
        if not unscored.any():
            return None
        firsts = np.maximum(begins + 1, known - unscored)
        stops = np.maximum(np.minimum(ends + 1, known), firsts)
        # What is sampled is scored at once, and nothing unscored comes before it.
        self._unscored[lineup.rows] = np.where(unscored > 0, known - np.maximum(known - unscored, stops), 0)
        return firsts, stops


def spans(firsts: Ints, counts: Ints) -> Ints:
    """For each i in turn, counts[i] numbers starting at firsts[i]."""
    numbers: Ints = np.arange(counts.sum()) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)
    return numbers
