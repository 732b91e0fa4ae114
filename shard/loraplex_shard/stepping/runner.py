"""Runs plans: rows, batch, decoder, sampler, result. One step at a time, on whichever thread calls.

Every rank of a group runs the same plans; rank 0 alone sees logits, samples and answers with tokens, and the others
learn from it what was sampled. Knows nothing of gRPC streams, of threads or of where weights came from.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from loraplex_protos.shard_pb2 import (
    FAILURE_REASON_GRAMMAR,
    FAILURE_REASON_NOT_FINITE,
    FAILURE_REASON_UNKNOWN_TOKEN,
    Sampling,
    SequenceStart,
    StepRequest,
    StepResponse,
)
from loraplex_shard.device.parallel import Group
from loraplex_shard.lora.store import AdapterStore
from loraplex_shard.models import Decoder
from loraplex_shard.sampling import sampler
from loraplex_shard.sampling.constraints import Constraints, Masks
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.shapes.batch import Segment
from loraplex_shard.shapes.cache import KVCache
from loraplex_shard.stepping.failures import Failures
from loraplex_shard.stepping.pooling import Pooling
from loraplex_shard.stepping.results import Tokens, add_prompt, add_tokens, describe
from loraplex_shard.stepping.rows import Chunks, Ints, Rows, spans

# Known tokens whose logprobs are computed at once: bounds the memory for logits.
LOGITS_SLICE = 256
# Fast-forward tokens of a sequence in one step.
MAX_FAST_FORWARD = 32

GREEDY = Sampling(top_p=1, typical_p=1, repetition_penalty=1)


class Runner:
    """Holds the rows of one rank. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        adapters: AdapterStore,
        group: Group,
        max_sequences: int,
        max_model_len: int,
        device: torch.device,
        grammars: GrammarCompiler,
        pools_last_token: bool = False,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._adapters = adapters
        self._group = group
        self._max_sequences = max_sequences
        self._max_model_len = max_model_len
        self._rows = Rows(max_sequences, max_model_len, decoder.vocab_size, cache.block_size, cache.num_blocks, device)
        self._constraints = Constraints(grammars, decoder.vocab_size)
        self._pooling = Pooling(pools_last_token)

    def clear(self) -> None:
        """Forgets all sequences."""
        self._rows.clear()
        self._constraints.clear()
        self._pooling.clear()

    @torch.inference_mode()
    def step(self, plan: StepRequest) -> StepResponse:
        """Runs one plan. On ranks other than 0 the result holds no more than the step's number.

        A sequence with a token that the model does not have, whose logits are not finite, or whose grammar cannot be
        followed, fails alone. A plan that does not fit the rows is an AssertionError: the router's mistake, after which
        the rows are not to be trusted.
        """
        for start in plan.starts:
            self._rows.start(start)
            if self._group.rank == 0:
                self._constraints.start(start)
        chunks = self._rows.advance(plan)
        response = StepResponse(step=plan.step)
        if len(chunks):
            segments = self._segments(chunks)
            masks = self._begin_masks(chunks)
            hidden = self._decoder(self._rows.batch(chunks, segments), self._cache)
            failures = Failures(len(chunks))
            failures.add(np.flatnonzero(self._rows.void[chunks.rows]), FAILURE_REASON_UNKNOWN_TOKEN)
            self._report_prompt(chunks, hidden, segments, failures, response)
            self._report_tokens(chunks, hidden, segments, masks, failures, response)
            if self._group.rank == 0:
                self._report_pooled(chunks, hidden, failures, response)
                failures.write(response)
        return response

    def warmup(self, max_batch_tokens: int) -> None:
        """Runs a prefill of max_batch_tokens and a decode of as many sequences as one step can hold, then clears."""
        whole, rest = divmod(max_batch_tokens, self._max_model_len)
        prefill = [self._max_model_len] * whole + [rest] * (rest > 0)
        self.step(self._warmup_plan(prefill[: self._max_sequences]))
        self.step(self._warmup_plan([1] * min(max_batch_tokens, self._max_sequences)))
        self.clear()

    def _warmup_plan(self, lengths: list[int]) -> StepRequest:
        """Sequences of these lengths. They may share blocks, since nobody reads what they compute."""
        counts = [-(-length // self._cache.block_size) for length in lengths]
        return StepRequest(
            starts=[
                SequenceStart(row=row, tokens=[0] * length, prompt_length=length, sampling=GREEDY)
                for row, length in enumerate(lengths)
            ],
            rows=range(len(lengths)),
            lengths=lengths,
            slots=[0] * len(lengths),
            samples=[True] * len(lengths),
            block_counts=counts,
            blocks=[block % self._cache.num_blocks for block in range(sum(counts))],
        )

    def _begin_masks(self, chunks: Chunks) -> Masks | None:
        if self._group.rank != 0:
            return None
        sampled = chunks.samples
        return self._constraints.begin(chunks.rows[sampled].tolist(), chunks.ends[sampled].tolist())

    def _segments(self, chunks: Chunks) -> tuple[Segment, ...]:
        """The runs of chunks that use one adapter, as runs of tokens."""
        changes = np.flatnonzero(np.diff(chunks.slots)) + 1
        runs = [0, *changes.tolist(), len(chunks)]
        return tuple(
            Segment(int(chunks.starts[first]), int(chunks.starts[last]), self._adapters.adapter_in(slot))
            for first, last in pairwise(runs)
            if (slot := int(chunks.slots[first]))
        )

    def _logits(self, hidden: Tensor, segments: tuple[Segment, ...], tokens: Ints) -> tuple[Tensor, Tensor] | None:
        """The logits [n, vocab] after these tokens of the batch, which are in ascending order, and whether they are
        finite [n]. Rank 0 only."""
        bounds = np.searchsorted(tokens, [(segment.start, segment.stop) for segment in segments]).reshape(-1, 2)
        chosen = tuple(
            Segment(int(start), int(stop), segment.adapter)
            for (start, stop), segment in zip(bounds, segments, strict=True)
            if start < stop
        )
        chosen_hidden = hidden if len(tokens) == len(hidden) else hidden[self._rows.on_device(tokens)]
        return self._decoder.logits(chosen_hidden, chosen)

    def _report_prompt(
        self,
        chunks: Chunks,
        hidden: Tensor,
        segments: tuple[Segment, ...],
        failures: Failures,
        response: StepResponse,
    ) -> None:
        """Adds the log probabilities of the prompt tokens that follow the chunks' positions, where asked for."""
        asked = self._rows.detail["prompt_logprobs"][chunks.rows]
        if not asked.any():
            return
        ends = np.minimum(chunks.ends, self._rows.prompt_lengths[chunks.rows] - 1)
        counts = np.where(asked, np.maximum(ends - chunks.begins, 0), 0)
        alternatives = self._rows.detail["prompt_top_logprobs"][chunks.rows]
        listed = (alternatives[counts > 0] > 0).any()
        for places, logits, tokens in self._following(chunks, hidden, segments, chunks.begins + 1, counts, failures):
            add_prompt(response, tokens, logits, alternatives[places] if listed else None)
        if self._group.rank == 0:
            response.prompt_logprob_counts.extend(counts.tolist())

    def _following(
        self,
        chunks: Chunks,
        hidden: Tensor,
        segments: tuple[Segment, ...],
        firsts: Ints,
        counts: Ints,
        failures: Failures,
    ) -> Iterator[tuple[Ints, Tensor, Tensor]]:
        """For counts[i] known tokens, from position firsts[i] of chunk i's sequence on, slice by slice: the places of
        their chunks [n], the logits [n, vocab] before them, and the tokens [n]. Nothing on ranks other than 0."""
        tokens = spans(chunks.starts[:-1] + firsts - 1 - chunks.begins, counts)
        places, positions = np.repeat(np.arange(len(chunks)), counts), spans(firsts, counts)
        for first in range(0, len(tokens), LOGITS_SLICE):
            part = slice(first, first + LOGITS_SLICE)
            computed = self._logits(hidden, segments, tokens[part])
            if computed is not None:
                logits, finite = computed
                failures.add(places[part][~finite.cpu().numpy()], FAILURE_REASON_NOT_FINITE)
                yield places[part], logits, self._rows.tokens_at(chunks.rows[places[part]], positions[part])

    def _report_tokens(
        self,
        chunks: Chunks,
        hidden: Tensor,
        segments: tuple[Segment, ...],
        masks: Masks | None,
        failures: Failures,
        response: StepResponse,
    ) -> None:
        """Samples after the chunks that ask for it, tells all ranks' rows, and adds to the response the tokens that can
        be reported: unscored ones that have their logprobs now, those just sampled, and fast-forward ones."""
        parts = [
            describe(places, tokens, logits, self._rows.detail[chunks.rows[places]])
            for places, logits, tokens in self._following(
                chunks, hidden, segments, chunks.score_begins, chunks.score_ends - chunks.score_begins, failures
            )
        ]
        if chunks.samples.any():
            parts += self._sample(chunks, hidden, segments, masks, failures, response)
        if self._group.rank == 0:
            add_tokens(response, len(chunks), parts)

    def _sample(
        self,
        chunks: Chunks,
        hidden: Tensor,
        segments: tuple[Segment, ...],
        masks: Masks | None,
        failures: Failures,
        response: StepResponse,
    ) -> list[Tokens]:
        """What was sampled and, where it is reported at once, fast_forward."""
        places = np.flatnonzero(chunks.samples)
        rows, lengths = chunks.rows[places], chunks.ends[places]
        computed = self._logits(hidden, segments, chunks.starts[1:][places] - 1)
        tokens = torch.zeros(len(places), dtype=torch.int64, device=hidden.device)
        if computed is not None:
            logits, finite = computed
            bias = self._rows.bias(rows)
            allowed = logits if bias is None else bias.apply(logits)
            allowed = allowed if masks is None else masks.apply(allowed)
            tokens = sampler.sample(allowed, self._rows.sampling[rows], self._rows.history(rows, lengths))
        self._group.broadcast_(tokens)
        self._rows.record(rows, lengths, tokens)
        if masks is not None:
            self._constraints.accept(rows.tolist(), tokens.tolist())
        fast_forward = self._fast_forward(rows)
        if computed is None:
            return []
        failures.add(places[~finite.cpu().numpy()], FAILURE_REASON_NOT_FINITE)
        failures.add(places[self._constraints.failed(rows.tolist())], FAILURE_REASON_GRAMMAR)
        spared = failures.spare(places)
        if not spared.all():
            good = np.flatnonzero(spared)
            index = self._rows.on_device(good)
            places, fast_forward, tokens, logits = places[good], fast_forward[good], tokens[index], logits[index]
        sampled = describe(places, tokens, logits, self._rows.detail[chunks.rows[places]])
        return [sampled, *self._report_fast_forward(chunks, places, fast_forward, response)]

    def _fast_forward(self, rows: Ints) -> Ints:
        """Adds to these rows, on all ranks, the fast-forward tokens after those just sampled.

        Returns it, padded with -1: [n, MAX_FAST_FORWARD], or [n, 0] if none of the rows has a grammar. A row that wants
        logprobs samples its last token in any case, for then there is a logprob of it.
        """
        forceable, scored = self._rows.forceable[rows], self._rows.scores(rows)
        fast_forward = np.full((len(rows), MAX_FAST_FORWARD if forceable.any() else 0), -1, np.int64)
        if fast_forward.size:
            if self._group.rank == 0:
                for place in np.flatnonzero(forceable).tolist():
                    most = min(MAX_FAST_FORWARD, int(self._rows.room(rows[place])))
                    tokens = self._constraints.fast_forward(int(rows[place]), most, end=not scored[place])
                    fast_forward[place, : len(tokens)] = tokens
            on_device = self._rows.on_device(fast_forward)
            self._group.broadcast_(on_device)
            self._rows.fast_forward(rows, on_device)
        return fast_forward

    def _report_fast_forward(
        self, chunks: Chunks, places: Ints, fast_forward: Ints, response: StepResponse
    ) -> list[Tokens]:
        """Fast-forward tokens [places, most], padded with -1: reported now, or unscored if their row has logprobs."""
        if not (fast_forward >= 0).any():
            return []
        scored = self._rows.scores(chunks.rows[places])[:, None]
        now, later = (fast_forward >= 0) & ~scored, (fast_forward >= 0) & scored
        if later.any():
            response.unscored_counts.extend(np.bincount(places, later.sum(1), len(chunks)).astype(int).tolist())
            response.unscored_tokens.extend(fast_forward[later].tolist())
        return [Tokens(np.repeat(places, now.sum(1)), fast_forward[now])] if now.any() else []

    def _report_pooled(self, chunks: Chunks, hidden: Tensor, failures: Failures, response: StepResponse) -> None:
        """Adds the vectors of the sequences that are pooled and whose last token was computed."""
        for place in np.flatnonzero(self._rows.detail["pool"][chunks.rows]).tolist():
            row, begin, end = (int(column[place]) for column in (chunks.rows, chunks.begins, chunks.ends))
            self._pooling.add(row, begin, hidden[chunks.starts[place] : chunks.starts[place + 1]])
            if end == self._rows.prompt_lengths[row]:
                vector = self._pooling.finish(row)
                if vector.isfinite().all():
                    response.pooled_chunks.append(place)
                    response.pooled.extend(vector.tolist())
                else:
                    failures.add(np.array([place]), FAILURE_REASON_NOT_FINITE)
