"""A step whose forward pass has been enqueued: what is sampled after it, and what is answered of it.

All ranks go through it together. Rank 0 alone sees logits, samples and answers; the others learn from it what was
sampled. On a GPU, nothing here waits for the device, except for sequences with grammars or bad words, whose next tokens
depend on the last one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex_protos.shard_pb2 import FAILURE_REASON_UNKNOWN_TOKEN
from loraplex_shard.device.copies import Mark, to_device, to_host
from loraplex_shard.device.parallel import Group
from loraplex_shard.models import Model
from loraplex_shard.ops.base import Outputs, Scored
from loraplex_shard.sampling import sampler
from loraplex_shard.sampling.constraints import Constraints, Masks
from loraplex_shard.shapes.batch import Segment
from loraplex_shard.shapes.classifier import Classifier
from loraplex_shard.stepping.failures import Failures
from loraplex_shard.stepping.lineup import Ints, SampledChunks
from loraplex_shard.stepping.pooling import PooledChunk, Pooling
from loraplex_shard.stepping.results import Sample, StepResults
from loraplex_shard.stepping.rows import Chunks, Rows, spans
from loraplex_shard.stepping.tokens import describe, describe_prompt

# Known tokens whose logprobs are computed at once: bounds the memory for logits.
LOGITS_SLICE = 256
# Fast-forward tokens of a sequence in one step.
MAX_FAST_FORWARD = 32


@dataclass(frozen=True, slots=True)
class Parts:
    """What all steps of a rank work with."""

    model: Model
    rows: Rows
    constraints: Constraints
    pooling: Pooling
    classifier: Classifier | None  # the model's
    group: Group


class StepInProgress:
    """`outputs` are what the model made of the chunks, `segments` their runs of tokens by adapter; `masks`, on rank 0,
    what grammars allow next."""

    def __init__(
        self,
        parts: Parts,
        chunks: Chunks,
        segments: tuple[Segment, ...],
        masks: Masks | None,
        outputs: Outputs,
    ) -> None:
        self._model, self._rows, self._group = parts.model, parts.rows, parts.group
        self._constraints, self._pooling, self._classifier = parts.constraints, parts.pooling, parts.classifier
        self._chunks, self._lineup = chunks, chunks.lineup
        self._segments = segments
        self._masks = masks
        self._outputs, self._hidden = outputs, outputs.hidden
        failures = Failures()
        failures.add(self._lineup.void, FAILURE_REASON_UNKNOWN_TOKEN)
        self._results = StepResults(len(chunks), failures)

    def finish(self) -> StepResults:
        """Samples where the plan asks for it, and tells all ranks' rows. Returns what rank 0 has found."""
        if self._lineup.scores_prompts:
            self._report_prompt()
        self._report_unscored()
        if len(self._lineup.sampled):
            self._sample(self._lineup.sampled)
        if self._group.rank == 0:
            self._report_pooled()
        return self._results

    def _logits(self, tokens: Ints) -> Scored | None:
        """The logits [n, vocab] after these tokens of the batch, which are in ascending order, and whether they are
        finite [n]. Rank 0 only."""
        if len(tokens) == len(self._hidden):
            return self._model.logits(self._hidden, self._segments)
        bounds = np.searchsorted(tokens, [(segment.start, segment.stop) for segment in self._segments]).reshape(-1, 2)
        chosen = tuple(
            Segment(int(start), int(stop), segment.adapter)
            for (start, stop), segment in zip(bounds, self._segments, strict=True)
            if start < stop
        )
        (on_device,) = to_device([tokens], self._hidden.device)
        return self._model.logits(self._hidden[on_device], chosen)

    def _report_prompt(self) -> None:
        """Adds the log probabilities of the prompt tokens that follow the chunks' positions, where asked for."""
        starts = self._lineup.starts
        ends = np.minimum(self._chunks.ends, starts["prompt_length"] - 1)
        counts = np.where(starts["detail"]["prompt_logprobs"], np.maximum(ends - self._chunks.begins, 0), 0)
        alternatives = starts["detail"]["prompt_top_logprobs"]
        listed = (alternatives[counts > 0] > 0).any()
        for places, logits, tokens in self._following(self._chunks.begins + 1, counts):
            self._results.prompt.append(describe_prompt(tokens, logits, alternatives[places] if listed else None))
        self._results.prompt_counts = counts

    def _following(self, firsts: Ints, counts: Ints) -> Iterator[tuple[Ints, Tensor, Tensor]]:
        """For counts[i] known tokens, from position firsts[i] of chunk i's sequence on, slice by slice: the places of
        their chunks [n], the logits [n, vocab] before them, and the tokens [n]. Nothing on ranks other than 0."""
        tokens = spans(self._lineup.offsets[:-1] + firsts - 1 - self._chunks.begins, counts)
        places, positions = np.repeat(np.arange(len(self._chunks)), counts), spans(firsts, counts)
        for first in range(0, len(tokens), LOGITS_SLICE):
            part = slice(first, first + LOGITS_SLICE)
            computed = self._logits(tokens[part])
            if computed is not None:
                logits, finite = computed
                self._results.finite.append((places[part], to_host(finite)))
                yield places[part], logits, self._rows.tokens_at(self._lineup.rows[places[part]], positions[part])

    def _report_unscored(self) -> None:
        """Adds the unscored tokens that have their logprobs now."""
        if self._chunks.scored is None:
            return
        firsts, stops = self._chunks.scored
        for places, logits, tokens in self._following(firsts, stops - firsts):
            self._results.scored.append(describe(places, tokens, logits, self._lineup.starts["detail"][places]))

    def _sample(self, sampled: SampledChunks) -> None:
        """Samples, and adds what was sampled and the fast-forward tokens after it."""
        places, tokens = sampled.places, self._outputs.tokens
        scored = self._logits(sampled.tokens) if tokens is None else self._outputs.scored
        if tokens is None or not sampled.drawn_at_once:
            tokens = self._choose(sampled, scored)
        if self._masks is not None and self._constraints.follows(rows := sampled.rows.tolist()):
            known = to_host(tokens)
            Mark(tokens.device).wait()
            self._constraints.accept(rows, known.tolist())
        fast_forward = self._fast_forward(sampled)
        if scored is not None:
            logits, finite = scored
            self._results.finite.append((places, to_host(finite)))
            if len(sampled.forceable):
                self._results.broken = places[self._constraints.failed(sampled.rows.tolist())]
            described = describe(places, tokens, logits, sampled.detail)
            self._results.sample = Sample(described, fast_forward, sampled.scored)

    def _choose(self, sampled: SampledChunks, scored: Scored | None) -> Tensor:
        """Samples from the logits, which rank 0 alone has, and appends the tokens to their rows."""
        if scored is None:
            tokens = torch.zeros(len(sampled), dtype=torch.int64, device=self._hidden.device)
        else:
            logits, _ = scored
            bias = self._rows.bias(sampled)
            logits = logits if bias is None else bias.apply(logits)
            logits = logits if self._masks is None else self._masks.apply(logits)
            history = self._rows.history(sampled, self._chunks.ends[sampled.places])
            tokens = sampler.sample(logits, sampled.sampling, history)
        self._group.broadcast_(tokens)
        self._rows.record(self._chunks, tokens)
        return tokens

    def _fast_forward(self, sampled: SampledChunks) -> Ints:
        """Adds to these rows, on all ranks, the fast-forward tokens after those just sampled.

        Returns it, padded with -1: [n, MAX_FAST_FORWARD], or [n, 0] if none of the rows has a grammar. A row that wants
        logprobs samples its last token in any case, for then there is a logprob of it.
        """
        fast_forward = np.full((len(sampled), MAX_FAST_FORWARD if len(sampled.forceable) else 0), -1, np.int64)
        if fast_forward.size:
            if self._group.rank == 0:
                for place in sampled.forceable.tolist():
                    row = int(sampled.rows[place])
                    most = min(MAX_FAST_FORWARD, self._rows.room(row))
                    tokens = self._constraints.fast_forward(row, most, end=not sampled.scored[place])
                    fast_forward[place, : len(tokens)] = tokens
            (on_device,) = to_device([fast_forward], self._hidden.device)
            self._group.broadcast_(on_device)
            self._rows.fast_forward(sampled, on_device)
        return fast_forward

    def _report_pooled(self) -> None:
        """Adds the vectors of pooled sequences whose last token was computed, and what classifiers make of tokens."""
        for place in self._lineup.pooled:
            vector = self._pooling.add(self._pooled_chunk(place))
            if vector is not None:
                self._results.pooled.append((place, to_host(vector)))

    def _pooled_chunk(self, place: int) -> PooledChunk:
        chunks, lineup = self._chunks, self._lineup
        row, begin, end, first = (int(c[place]) for c in (lineup.rows, chunks.begins, chunks.ends, lineup.offsets))
        tokens = self._rows.tokens_at(np.full(end - begin, row), np.arange(begin, end))
        start = lineup.starts[place]
        classifier = self._classifier_of(first) if start["detail"]["classify"] else None
        hidden, last = self._hidden[first : first + end - begin], bool(end == start["prompt_length"])
        return PooledChunk(row, begin, hidden, tokens, last, classifier)

    def _classifier_of(self, token: int) -> Classifier:
        """Of the adapter of this token of the batch, or the model's."""
        adapters = (segment.adapter for segment in self._segments if segment.start <= token < segment.stop)
        own = next((adapter.classifier for adapter in adapters), None)
        classifier = own or self._classifier
        assert classifier is not None, "nothing classifies"
        return classifier
