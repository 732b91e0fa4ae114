"""Runs plans: rows, batch, model, then what StepInProgress does. One step at a time, on whichever thread calls.

Every rank of a group runs the same plans. Knows nothing of gRPC streams, of threads or of where weights came from.
"""

import time
from collections.abc import Sequence
from typing import Protocol

import torch

from loraplex_protos.shard_pb2 import StepRequest, StepResponse
from loraplex_shard.checkpoint.base import PoolingSpec
from loraplex_shard.device.parallel import Group
from loraplex_shard.models import Model
from loraplex_shard.sampling.constraints import Constraints
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.shapes.adapter import AdapterWeights
from loraplex_shard.shapes.batch import Segment
from loraplex_shard.shapes.cache import KVCache
from loraplex_shard.shapes.classifier import Classifier
from loraplex_shard.stepping.lineup import Lineup
from loraplex_shard.stepping.pooling import Pooling
from loraplex_shard.stepping.progress import Parts, StepInProgress
from loraplex_shard.stepping.results import PendingStep
from loraplex_shard.stepping.rows import Rows
from loraplex_shard.stepping.warmup import Limits, plans, recorded


class Slots(Protocol):
    """Adapters by slot, from 1."""

    def adapter_in(self, slot: int) -> AdapterWeights: ...


class Runner:
    """Holds the rows of one rank. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        slots: Slots,
        group: Group,
        max_sequences: int,
        max_model_len: int,
        device: torch.device,
        grammars: GrammarCompiler,
        pooling: PoolingSpec | None = None,
        classifier: Classifier | None = None,
    ) -> None:
        """`classifier`: the model's."""
        rows = Rows(max_sequences, max_model_len, model.vocab_size, cache.block_size, cache.num_blocks, device)
        constraints = Constraints(grammars, model.vocab_size)
        self._parts = Parts(model, rows, constraints, Pooling(pooling or PoolingSpec()), classifier, group)
        self._cache = cache
        self.slots = slots  # may be exchanged between plans
        self._device = device
        self._max_sequences = max_sequences
        self._max_model_len = max_model_len

    def clear(self) -> None:
        """Forgets all sequences."""
        self._parts.rows.clear()
        self._parts.constraints.clear()
        self._parts.pooling.clear()

    def step(self, plan: StepRequest) -> StepResponse:
        """Runs one plan, and waits for what it finds."""
        return self.begin(plan).response()

    @torch.inference_mode()
    def begin(self, plan: StepRequest) -> PendingStep:
        """Runs one plan. A GPU may compute it after this has returned, and after it the plans that begin next.

        A sequence with a token that the model does not have, whose logits are not finite, or whose grammar cannot be
        followed, fails alone. A plan that does not fit the rows is an AssertionError: the router's mistake, after which
        the rows are not to be trusted.
        """
        for start in plan.starts:
            assert not (start.computed and self._cache.states), f"row {start.row}: a model with states begins at 0"
            self._parts.rows.start(start)
            if self._parts.group.rank == 0:
                self._parts.constraints.start(start)
        chunks = self._parts.rows.advance(plan)
        results = None
        if len(chunks):
            segments = self._segments(chunks.lineup)
            sampled = chunks.lineup.sampled
            masks = None
            if sampled.constrained and self._parts.group.rank == 0:
                lengths = chunks.ends[sampled.places].tolist()
                masks = self._parts.constraints.begin(sampled.rows.tolist(), lengths)
            outputs = self._parts.model(self._parts.rows.inputs(chunks, segments), self._cache)
            results = StepInProgress(self._parts, chunks, segments, masks, outputs).finish()
        return PendingStep(plan.step, self._device, results if self._parts.group.rank == 0 else None)

    def warmup(self, max_batch_tokens: int, flat: bool) -> float:
        """Runs the plans of warmup.py, then clears. Returns how many seconds the longest step took."""
        limits = Limits(max_batch_tokens, self._max_sequences, self._max_model_len)
        longest = 0.0
        for plan in plans(limits, self._cache, self._parts.model.generates, flat):
            began = time.monotonic()
            self.step(plan)
            longest = max(longest, time.monotonic() - began)
        self.clear()
        return longest

    def record(self, sizes: Sequence[int], max_batch_tokens: int) -> None:
        """Runs steps of these numbers of tokens, so that they are recorded; then clears."""
        limits = Limits(max_batch_tokens, self._max_sequences, self._max_model_len)
        for plan in recorded(sizes, limits, self._cache, self._parts.model.generates):
            self.step(plan)
        self.clear()

    def _segments(self, lineup: Lineup) -> tuple[Segment, ...]:
        """The runs of tokens that use one adapter."""
        return tuple([Segment(first, stop, self.slots.adapter_in(slot)) for first, stop, slot in lineup.runs])
