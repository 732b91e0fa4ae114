"""One sequence's output for the client: text and tokens as they become certain, merged while nobody reads."""

import asyncio
from array import array
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import replace
from hashlib import blake2b

from loraplex_router.engine.delta import Delta
from loraplex_router.engine.replay import Replay
from loraplex_router.text.detokenizer import Decoder, Detokenizer, own_length
from loraplex_router.text.stops import Passed, StopMatcher
from loraplex_router.vocabulary.position import Reached
from loraplex_router.vocabulary.sequence import Alternatives, FinishReason, Sample, Sequence
from loraplex_router.vocabulary.thoughts import Thoughts


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
        self.resumed = 0  # of these, the tokens that another generation had left in the journal
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
        self.resumed = len(tokens)
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
