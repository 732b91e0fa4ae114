"""A generation's output for the client: text and tokens as they become certain, merged while nobody reads."""

import asyncio
import secrets
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterable
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from loraplex_protos.errors import LoraplexError
from loraplex_protos.generation_pb2 import Classifier
from loraplex_router.engine.replay import Replay
from loraplex_router.text.detokenizer import Decoder, Detokenizer, own_length
from loraplex_router.text.stops import Passed, StopMatcher
from loraplex_router.vocabulary.adapter import BASE_NAME, Adapter
from loraplex_router.vocabulary.position import Reached
from loraplex_router.vocabulary.references import Reference, labels_of, version_of
from loraplex_router.vocabulary.sequence import Alternatives, FinishReason, Sample, Sequence
from loraplex_router.vocabulary.thoughts import Thoughts


@dataclass(slots=True)
class Delta:
    """What is new since the reader last looked."""

    text: str = ""
    samples: list[Sample] = field(default_factory=list)
    ends: list[int] = field(
        default_factory=list
    )  # for each sample, the text's length up to its end, in whole characters
    finish_reason: FinishReason | None = None  # set on the last one
    generated: int = 0  # tokens of the sequence up to here; the text of some may still be held back
    known: int = 0  # how many of the events that it is written as the client has already

    def add(self, later: "Delta") -> None:
        """Appends the delta that follows this one."""
        self.text += later.text
        self.samples += later.samples
        self.ends += later.ends
        self.finish_reason = later.finish_reason
        self.generated = later.generated

    @property
    def num_logprobs(self) -> int:
        """Number of logprobs, including alternatives."""
        return len(self.samples) * (1 + len(self.samples[0].alternatives)) if self.samples else 0

    @property
    def mean_logprob(self) -> float:
        """The mean logprob of its tokens, by which answers are ranked. Their logprobs must be known."""
        return sum(sample.logprob or 0.0 for sample in self.samples) / max(1, len(self.samples))


@dataclass(frozen=True, slots=True)
class Embedding:
    """A vector of the last hidden states of an input."""

    values: "array[float]"
    prompt_tokens: int
    warnings: tuple[str, ...] = ()  # what its reader should know
    adapter_digest: str = ""
    adapter_version: str = ""


@dataclass(frozen=True, slots=True)
class Classification:
    """What a classifier makes of an input: one logit per label or, if it classifies tokens, per token and label."""

    classifier: Classifier
    logits: "array[float]"
    tokens: list[int]  # of the input
    warnings: tuple[str, ...] = ()
    adapter_digest: str = ""
    adapter_version: str = ""


class SequenceOutput:
    """Turns one sequence's tokens into deltas. A token is shown once all of its text is shown."""

    def __init__(
        self,
        sequence: Sequence,
        decoder: Decoder,
        stops: StopMatcher,
        wakeup: asyncio.Event,
        stop_token_ids: Collection[int] = (),
        thoughts: Thoughts | None = None,
        nonce: str = "",
    ) -> None:
        """`stop_token_ids`: the end tokens set by the request. `thoughts`: those that the text may begin with. `nonce`:
        what ids are made of."""
        self.sequence = sequence
        self.thoughts = thoughts
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None  # the request's stop text or token that ended it
        self.generated = 0  # tokens, including those of a stop string
        self.prompt_logprobs: list[float] = []  # of all prompt tokens except the first
        self.prompt_ranks: list[int] = []  # of the same: 1 is the likeliest
        self.prompt_alternatives: list[Alternatives] = []  # of the same; none if not requested
        self.pooled = array("f")
        self._decoder = decoder
        self._detokenizer = Detokenizer(decoder, sequence.tokens[: sequence.prompt_length])
        self._stops = stops
        self._stop_token_ids = stop_token_ids
        self._wakeup = wakeup
        self._nonce = nonce.encode()
        self._pending = Delta()
        self._undecoded: list[Sample] = []  # parts of an incomplete character
        self._held: list[tuple[Sample, int, int]] = []  # with the lengths up to each one's end, generated and decoded
        self._generated = self._decoded = 0  # characters; special tokens that are not shown are generated, not decoded
        self._passed = self._shown = 0  # characters of the two that are certain
        self._replay = Replay(Reached())
        self._delivered = deque[Delta]()  # what comes again

    @property
    def seed(self) -> int | None:
        """The seed that reproduces it; None if it was not sampled."""
        sampling = self.sequence.sampling
        return sampling.seed if sampling.temperature else None

    def new_id(self, *of: int | str) -> str:
        """An id for a part of the answer. Nobody else has it, and it stays the same when the output is resumed."""
        return blake2b(repr(of).encode(), key=self._nonce, digest_size=12).hexdigest()

    @property
    def resumed(self) -> int:
        """How many of its tokens another generation had delivered."""
        return self._replay.tokens

    def push(self, sample: Sample) -> FinishReason | None:
        """Takes the sequence's next token. Returns why the sequence ends with it, if it does."""
        self.generated += 1
        ends = sample.token in self.sequence.end_token_ids
        asked = ends and sample.token in self._stop_token_ids
        ended = ends and not (asked and self._stops.include)  # by a token that is not part of the answer
        last = ends or self.generated >= self.sequence.max_new_tokens
        hidden = "" if ended else self._decoder.hidden_text(sample.token)
        text = "" if ended or hidden else self._detokenizer.push(sample.token)
        if last:
            text += self._detokenizer.flush()
        self._hold(sample, hidden, text, ended, last)
        stopped = self._seek_stop(hidden, text)
        if stopped and self._stops.include:
            self._show_held()
        elif last and not stopped:
            self._show(self._stops.flush())
        if asked:
            self.stop_reason = sample.token
        if stopped:
            self.stop_reason = self._stops.found
        if stopped or ends:
            self.finish(FinishReason.END_TOKEN if ended and not stopped else FinishReason.STOP_TEXT)
        elif last:
            self.finish(FinishReason.LENGTH)
        if self._replay:
            self._deliver_again()
        return self.finish_reason

    def resume(self, tokens: list[int], reached: Reached) -> None:
        """Continues from the tokens of another output for the same request, whose client has what was `reached`. What
        it has comes again, in deltas that say so. Raises GenerationError if the tokens are not those it has."""
        sequence, detail = self.sequence, self.sequence.detail
        self._replay = Replay(reached)
        if reached.tokens and detail.prompt_logprobs:  # the client has these
            self.prompt_logprobs = [0.0] * (sequence.prompt_length - 1)
            self.prompt_ranks = [0] * len(self.prompt_logprobs)
            self.prompt_alternatives = [()] * len(self.prompt_logprobs)
            sequence.detail = replace(detail, prompt_logprobs=False, prompt_top_logprobs=0)
        if detail.logprobs:  # the shard computes them again
            ended = bool(tokens) and tokens[-1] in sequence.end_token_ids
            sequence.tokens += tokens[:-1] if ended else tokens
            sequence.unscored = sequence.output_length
            return
        for token in tokens:
            sequence.tokens.append(token)
            if self.push(Sample(token)):
                break

    def _deliver_again(self) -> None:
        """Ends the delta where one ended that the client has, if that is here."""
        sequence = self.sequence
        answer = sequence.tokens[sequence.prompt_length : sequence.prompt_length + self.generated]
        known = self._replay.pass_end(answer, finished=self.finish_reason is not None)
        if known is not None:
            delta, self._pending = self._pending, Delta()
            delta.generated, delta.known = self.generated, known
            self._delivered.append(delta)
            self._wakeup.set()

    def pool(self, vector: Iterable[float], begin: int, last: bool) -> None:
        """Takes a pooled sequence's vector, or its part from position `begin` on. The last one ends the sequence."""
        if begin == 0:  # also of one that was preempted, and begins again
            del self.pooled[:]
        self.pooled.extend(vector)
        if last:
            self.finish(FinishReason.LENGTH)

    def finish(self, reason: FinishReason) -> None:
        """Ends the output; held-back text is not shown."""
        if reason is FinishReason.CANCELLED:
            self._replay.stop()
        self.finish_reason = self._pending.finish_reason = reason
        self._wakeup.set()

    @property
    def num_logprobs(self) -> int:
        """Number of logprobs reported so far, including alternatives."""
        detail = self.sequence.detail
        return self.num_prompt_logprobs + detail.logprobs * self.generated * (1 + detail.top_logprobs)

    @property
    def num_prompt_logprobs(self) -> int:
        return len(self.prompt_logprobs) * (1 + self.sequence.detail.prompt_top_logprobs)

    def texts(self) -> tuple[str, str]:
        """The text of the prompt and of the answer so far, including stop texts."""
        tokens, length = self.sequence.tokens, self.sequence.prompt_length
        return self._decoder.decode(tokens[:length]), self._decoder.decode(tokens[length:])

    def take(self) -> Delta | None:
        """Everything new since the last call, merged; None if there is nothing."""
        if self._delivered:
            self._wakeup.set()  # there may be more
            return self._delivered.popleft()
        delta = self._pending
        delta.generated = self.generated
        if self._replay or not (delta.text or delta.samples or delta.finish_reason):
            return None
        self._pending = Delta()
        return delta

    def _hold(self, sample: Sample, hidden: str, text: str, ended: bool, last: bool) -> None:
        """Keeps the token until all of its text is certain. A character made of several tokens belongs to the last."""
        parts = self._undecoded
        if not ended:
            parts.append(sample)
        if text or hidden or last:
            self._generated += len(text) + len(hidden)
            own = len(text) if ended or hidden else own_length(text, self._decoder.token_text(sample.token))
            before, self._decoded = self._decoded + len(text) - own, self._decoded + len(text)
            ends = [before] * (len(parts) - 1) + [self._decoded]
            self._held += [(part, self._generated, end) for part, end in zip(parts, ends, strict=False)]
            parts.clear()
        if ended:
            self._held.append((sample, self._generated, self._decoded))

    def _seek_stop(self, hidden: str, text: str) -> bool:
        """Shows the text that is certain now. Returns whether a stop string ends the output."""
        too_early = self.generated <= self.sequence.min_new_tokens
        if hidden:
            passed = self._stops.feed(hidden, shown=False, too_early=too_early)
            self._show(passed)
            if passed.stopped:
                return True
        passed = self._stops.feed(text, too_early=too_early)
        self._show(passed)
        return passed.stopped

    def _show(self, passed: Passed) -> None:
        pending, held = self._pending, self._held
        self._passed += passed.length
        self._shown += len(passed.text)
        pending.text += passed.text
        while held and held[0][1] <= self._passed:
            sample, _, end = held.pop(0)
            pending.samples.append(sample)
            pending.ends.append(end)
        self._wakeup.set()

    def _show_held(self) -> None:
        """Shows the tokens of a stop text that is part of the answer; the last token may extend beyond it."""
        for sample, _, end in self._held:
            self._pending.samples.append(sample)
            self._pending.ends.append(min(end, self._shown))


class Generation:
    """A running request: its sequences' outputs, read by one reader."""

    def __init__(
        self,
        request_id: str,
        reference: Reference | None,
        adapter: Adapter,
        arrived: float,
        validated: float,
        tenant: str = "",
        nonce: str = "",
    ) -> None:
        self.request_id = request_id
        self.reference = reference  # to the adapter, as requested
        self.adapter = adapter  # on the replica that runs the generation
        self.tenant = tenant  # its name, for the log
        self.stream = ""  # its key in the journal, if it is there
        self.nonce = nonce or secrets.token_hex(16)  # what the ids in its answers are made of
        self.arrived = arrived  # when the request arrived; like the next four, from time.monotonic
        self.validated = validated  # when everything but its adapter was ready
        self.queued = time.monotonic()
        self.started: float | None = None  # when the first step with one of its sequences was sent
        self.first_token: float | None = None  # when its first token arrived
        self.outputs: list[SequenceOutput] = []
        self.warnings: tuple[str, ...] = ()  # what its reader should know
        self.error: LoraplexError | None = None
        self._wakeup = asyncio.Event()

    def add(
        self,
        sequence: Sequence,
        decoder: Decoder,
        stops: StopMatcher,
        stop_token_ids: Collection[int] = (),
        thoughts: Thoughts | None = None,
    ) -> None:
        nonce = f"{self.nonce}/{len(self.outputs)}"
        self.outputs.append(SequenceOutput(sequence, decoder, stops, self._wakeup, stop_token_ids, thoughts, nonce))

    @property
    def adapter_name(self) -> str:
        """The id used in the request, or the version that it stands for, whichever others have the same content; parts
        of merged adapters are separated by commas."""
        return ",".join(labels_of(self.reference)) or BASE_NAME

    @property
    def adapter_digest(self) -> str:
        return self.adapter.digest

    @property
    def adapter_version(self) -> str:
        """The registry's version that answers; empty if the adapter is not one."""
        return version_of(self.reference)

    @property
    def unfinished(self) -> list[SequenceOutput]:
        return [output for output in self.outputs if output.finish_reason is None]

    @property
    def finished(self) -> bool:
        return self.error is not None or all(output.finish_reason for output in self.outputs)

    @property
    def prompt_length(self) -> int:
        """Number of tokens of the prompt."""
        return self.outputs[0].sequence.prompt_length

    @property
    def num_prompt(self) -> int:
        """The same; 0 if others have begun to answer it."""
        return 0 if any(output.resumed for output in self.outputs) else self.prompt_length

    @property
    def num_generated(self) -> int:
        """Number of tokens generated so far, except those that others had delivered."""
        return sum(max(0, output.generated - output.resumed) for output in self.outputs)

    @property
    def num_logprobs(self) -> int:
        """Number of logprobs reported so far, including alternatives."""
        return sum(output.num_logprobs for output in self.outputs)

    def resume(self, tokens: Iterable[list[int]], reached: Iterable[Reached]) -> None:
        """Continues from the tokens of another generation for the same request: see SequenceOutput.resume."""
        for output, known, place in zip(self.outputs, tokens, reached, strict=True):
            output.resume(known, place)

    def restart(self, adapter: Adapter) -> None:
        """Prepares its sequences to continue from where they are, on another replica."""
        self.adapter = adapter
        for output in self.unfinished:
            output.sequence.restart(adapter)

    def cancel(self) -> None:
        for output in self.unfinished:
            output.finish(FinishReason.CANCELLED)

    def fail(self, error: LoraplexError) -> None:
        self.error = error
        self._wakeup.set()

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Pairs (sequence index, delta) until all sequences are finished. Raises the error that ended the
        generation."""
        running = len(self.outputs)
        while running:
            await self._wakeup.wait()
            self._wakeup.clear()
            if self.error is not None:
                raise self.error
            for index, output in enumerate(self.outputs):
                if delta := output.take():
                    running -= delta.finish_reason is not None
                    yield index, delta

    async def collect(self) -> list[Delta]:
        """The whole answer: one delta per sequence. Raises the error that ended the generation."""
        whole = [Delta() for _ in self.outputs]
        async for index, delta in self.deltas():
            whole[index].add(delta)
        return whole
