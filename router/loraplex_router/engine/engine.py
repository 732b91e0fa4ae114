"""The engine of one replica: a task that schedules, sends plans, reads results and distributes tokens. Only it changes
the scheduler's state.

Plan n + 1 is sent before the result of plan n is there, so that the shards never wait for the router; but not much
sooner, so that a request that arrives while plan n runs is in plan n + 1. Tokens for a sequence that has already ended
are dropped.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from math import inf

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.errors import (
    FieldViolation,
    GenerationError,
    InvalidRequestError,
    LoraplexError,
    UnavailableError,
)
from loraplex_router.engine.changes import Changes
from loraplex_router.engine.generation import Generation
from loraplex_router.engine.observer import EngineObserver
from loraplex_router.engine.output import SequenceOutput
from loraplex_router.engine.pace import Pace
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.engine.scheduler import Scheduler
from loraplex_router.engine.suspects import Loss
from loraplex_router.engine.transfers import Transfers
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.sequence import Chunk, Plan, Sample
from loraplex_router.wire.codec import (
    encode_plan,
    read_pooled,
    read_prompt_alternatives,
    read_prompt_logprobs,
    read_prompt_ranks,
    read_samples,
    read_unscored,
)
from loraplex_router.wire.shards import EngineShards

logger = logging.getLogger(__name__)

DEPTH = 2  # plans in flight
QUIET_SECONDS = 0.25  # without other work, before background work begins

FAILURES = {
    pb.FAILURE_REASON_NOT_FINITE: "the model's output for this sequence held NaN or Inf",
    pb.FAILURE_REASON_UNKNOWN_TOKEN: "the model has no embedding for one of the tokens",
}
TOO_COMPLEX = "became too complex to enforce: make it simpler or less ambiguous"


class Engine:
    """Runs generations to their end. `run` is its task; the other methods are called from the same event loop."""

    def __init__(
        self, scheduler: Scheduler, pool: AdapterPool, shards: EngineShards, observer: EngineObserver, changes: Changes
    ) -> None:
        self._scheduler = scheduler
        self._shards = shards
        self._observer = observer
        self._changes = changes
        self._generations: dict[Generation, None] = {}
        self._owners: dict[object, tuple[Generation, SequenceOutput]] = {}  # by Sequence
        self._wakeup = asyncio.Event()
        self._transfers = Transfers(scheduler, pool, shards, changes, self.wake, self._fail_waiting)
        self._steps = 0
        self._in_flight: deque[Plan] = deque()
        self._result: asyncio.Task[pb.StepResponse] | None = None  # of the first plan in flight
        self._pace = Pace()
        self._quiet_since = 0.0  # by time.monotonic: the last result of a plan that was not a background one
        self._failed = False

    @property
    def idle(self) -> bool:
        return not self._generations

    @property
    def generations(self) -> Iterable[Generation]:
        return self._generations

    def __contains__(self, generation: Generation) -> bool:
        return generation in self._generations

    def waited(self, generation: Generation) -> float:
        """How long those before the generation have waited, in seconds: at least so long, it will have to wait. Only
        those of its tenant and adapter are certain to go first; 0 if there are none, or if the adapter is not on the
        device."""
        if generation.adapter.ready:
            for sequence in self._scheduler.waiting(generation.adapter, generation.tenant):
                before, _ = self._owners[sequence]
                if before.started is None:  # otherwise it waits to continue
                    return time.monotonic() - before.queued
        return 0.0

    def submit(self, generation: Generation) -> None:
        """Queues a generation's sequences, except those that have ended."""
        self._generations[generation] = None
        generation.adapter.requests += 1
        generation.adapter.last_used = time.time()
        for output in generation.unfinished:
            self._owners[output.sequence] = generation, output
            self._scheduler.add(output.sequence)
        self._wakeup.set()

    def wake(self) -> None:
        """Tells the engine that the scheduler's input has changed."""
        self._wakeup.set()

    def loss(self, busy: bool) -> Loss:
        """What the replica was computing when it was lost. `busy`: it was also preparing a request."""
        return Loss(tuple(self._in_flight), self._failed, busy)

    def release(self, started: bool) -> list[Generation]:
        """Removes and returns its generations, without ending them: all if `started`, otherwise those of which nothing
        was computed, and no sample of before they gave way is in flight: it might come when they are back."""
        begun = {g for g in self._generations if any(o.sequence.computed or o.sequence.in_flight for o in g.outputs)}
        released = [generation for generation in self._generations if started or generation not in begun]
        for generation in released:
            for output in generation.unfinished:
                self._scheduler.finish(output.sequence)
            self._forget(generation)
        return released

    def cancel(self, generation: Generation) -> None:
        """Ends its unfinished sequences; their blocks are free by the next step. Does nothing if it runs elsewhere."""
        if generation in self:
            for output in generation.unfinished:
                self._scheduler.finish(output.sequence)
            generation.cancel()
            self._retire(generation)

    def fail(self, generation: Generation, error: LoraplexError) -> None:
        """Ends it with an error. Does nothing if it runs elsewhere."""
        if generation in self:
            self._end(generation, error)

    async def run(self) -> None:
        """Runs until cancelled. Raises UnavailableError if a shard fails: the generations can then be released to run
        elsewhere. If the loop itself fails, they end with the error, since they may be its cause."""
        try:
            await self._loop()
        except LoraplexError as error:
            self._failed = not isinstance(error, UnavailableError)
            raise UnavailableError(f"a shard failed: {error.message}") from error
        except Exception as error:
            logger.exception("the engine's loop failed")
            failure = UnavailableError("the router failed; its log has the details")
            for generation in list(self._generations):
                self._end(generation, failure)
            raise failure from error
        finally:
            self._transfers.cancel()
            if self._result is not None:
                self._result.cancel()

    async def _loop(self) -> None:
        while self._transfers.lost is None:
            await self._until_next_plan_is_due()
            began = time.perf_counter()
            self._transfers.begin()
            to_background = self._seconds_to_background()
            plan = self._scheduler.schedule(background=to_background <= 0)
            if plan is not None:
                self._mark_started(plan)
                request = encode_plan(plan, self._steps)
                self._steps += 1
                self._observer.planned(time.perf_counter() - began)
                while self._in_flight and (plan.alone or self._in_flight[-1].alone):
                    await self._apply_next()
                if not self._in_flight:
                    self._pace.begin(time.monotonic())
                self._in_flight.append(plan)
                await self._shards.send(request)
            if len(self._in_flight) == DEPTH or (self._in_flight and plan is None):
                await self._apply_next()
            elif plan is None:
                await self._until_something_is_to_be_done(to_background)
            self._wakeup.clear()
        raise self._transfers.lost

    async def _until_next_plan_is_due(self) -> None:
        if self._in_flight:
            seconds = self._pace.until_next(self._in_flight[0].tokens, time.monotonic())
            if seconds > 0:
                self._transfers.begin()  # adapters need not wait until then to be loaded
                await asyncio.wait([self._receiving()], timeout=seconds)

    def _seconds_to_background(self) -> float:
        """A background plan leaves when no other plan has been in flight for a while, so that those who ask one
        question after the other do not meet it, and never on top of another plan, so that a newcomer waits for one at
        most."""
        return inf if self._in_flight else self._quiet_since + QUIET_SECONDS - time.monotonic()

    async def _until_something_is_to_be_done(self, to_background: float) -> None:
        """`to_background`: what the last call of `schedule` went by; meanwhile the time may have come."""
        waits = self._scheduler.background and to_background > 0
        with suppress(TimeoutError):
            async with asyncio.timeout(to_background if waits else None):
                await self._wakeup.wait()

    def _receiving(self) -> asyncio.Task[pb.StepResponse]:
        if self._result is None:
            self._result = asyncio.create_task(self._shards.receive())
            self._result.add_done_callback(lambda task: task.cancelled() or task.exception())  # sending may fail first
        return self._result

    def _mark_started(self, plan: Plan) -> None:
        for sequence in plan.starts:
            generation, _ = self._owners[sequence]
            if generation.started is None:
                generation.started = time.monotonic()
                self._observer.started(generation)
            elif sequence.attempts > 1:
                self._observer.started_again(generation, sequence)

    # ---- results ---------------------------------------------------------------------------------------------

    async def _apply_next(self) -> None:
        try:
            response = await self._receiving()
        finally:
            self._result = None
        plan = self._in_flight.popleft()
        now = time.monotonic()
        self._pace.end(plan.tokens, response.duration_us / 1e6, now)
        if not plan.background:
            self._quiet_since = now
        self._apply(plan, response)

    def _apply(self, plan: Plan, response: pb.StepResponse) -> None:
        began = time.perf_counter()
        self._scheduler.complete(plan)
        self._observer.step(plan, response)
        failures = dict(zip(response.failed_chunks, response.failure_reasons, strict=True))
        prompt_logprobs = read_prompt_logprobs(response, len(plan.chunks))
        prompt_ranks, prompt_alternatives = read_prompt_ranks(response), read_prompt_alternatives(response)
        pooled = read_pooled(response)
        unscored = read_unscored(response, len(plan.chunks))
        for place, (chunk, samples) in enumerate(zip(plan.chunks, read_samples(response, plan.chunks), strict=True)):
            owner = self._owners.get(chunk.sequence)
            if owner is None or chunk.sequence.finished:
                continue
            generation, output = owner
            if place in failures:
                self._fail(generation, chunk, _failure(chunk.sequence.grammar, failures[place]))
                continue
            if prompt_logprobs[place]:
                output.prompt_logprobs[chunk.start :] = prompt_logprobs[place]
                output.prompt_ranks[chunk.start :] = prompt_ranks[place]
                output.prompt_alternatives[chunk.start :] = prompt_alternatives[place]
            if place in pooled:
                last = chunk.start + chunk.length == chunk.sequence.prompt_length
                output.pool(pooled[place], chunk.start, last)
                if last:
                    self._scheduler.finish(chunk.sequence)
            if samples and generation.first_token is None:
                generation.first_token = time.monotonic()
                self._observer.first_token(generation)
            try:
                self._take(chunk, output, samples)
            except (KeyboardInterrupt, SystemExit):
                raise
            except GenerationError as diverged:  # it was resumed
                self._fail(generation, chunk, diverged)
                continue
            except BaseException:  # a panic in the tokenizer is not an Exception
                logger.exception("a sequence's tokens cannot be decoded")
                error = GenerationError("its tokens cannot be decoded; the router's log has the details")
                self._fail(generation, chunk, error)
                continue
            if unscored[place] and not chunk.sequence.finished:
                self._scheduler.add_unscored(chunk.sequence, unscored[place])
            if output.finish_reason and generation.finished:
                self._retire(generation)
        self._changes.notify()
        self._observer.applied(time.perf_counter() - began)

    def _take(self, chunk: Chunk, output: SequenceOutput, samples: Sequence[Sample]) -> None:
        """Applies a chunk's tokens: earlier unscored ones, then the sampled one, then the fast-forward ones after
        it."""
        sequence = chunk.sequence
        if chunk.attempt != sequence.attempts:
            return  # it has restarted meanwhile, and unscored tokens will be sent again
        take = self._scheduler.record
        for sample in samples:
            if sequence.unscored:
                assert sample.token == sequence.tokens[-sequence.unscored]
                sequence.unscored -= 1
            else:
                take(sequence, sample.token)
                take = self._scheduler.fast_forward
            if output.push(sample):
                self._scheduler.finish(sequence)
                break

    def _fail(self, generation: Generation, chunk: Chunk, error: LoraplexError) -> None:
        self._scheduler.fail(chunk.sequence)
        self._end(generation, error)

    def _end(self, generation: Generation, error: LoraplexError) -> None:
        generation.fail(error)
        for output in generation.outputs:
            self._scheduler.finish(output.sequence)
        self._retire(generation)

    def _retire(self, generation: Generation) -> None:
        if generation in self:
            self._forget(generation)
            self._observer.ended(generation)

    def _forget(self, generation: Generation) -> None:
        del self._generations[generation]
        generation.adapter.requests -= 1
        generation.adapter.last_used = time.time()
        for output in generation.outputs:
            self._owners.pop(output.sequence, None)
        self._changes.notify()

    def _fail_waiting(self, adapter: Adapter, error: LoraplexError) -> None:
        for generation in [g for g in self._generations if g.adapter_digest == adapter.digest]:
            self._end(generation, error)


def _failure(grammar: Grammar | None, reason: pb.FailureReason.ValueType) -> LoraplexError:
    """The error for a shard's reason, in a sequence with this grammar."""
    if grammar and reason == pb.FAILURE_REASON_GRAMMAR:
        return InvalidRequestError(FieldViolation(grammar.field, TOO_COMPLEX))
    return GenerationError(FAILURES.get(reason, "unknown reason"))
