"""A request that runs: its sequences' outputs, who waits for them, and when what happened."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Collection, Iterable

from loraplex_protos.errors import LoraplexError
from loraplex_router.engine.delta import Delta
from loraplex_router.engine.output import SequenceOutput
from loraplex_router.text.detokenizer import Decoder
from loraplex_router.text.stops import StopMatcher
from loraplex_router.vocabulary.adapter import BASE_NAME, Adapter
from loraplex_router.vocabulary.position import Reached
from loraplex_router.vocabulary.references import Reference, labels_of, version_of
from loraplex_router.vocabulary.sequence import FinishReason, Sequence
from loraplex_router.vocabulary.thoughts import Thoughts


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
        self.tenant = tenant  # its name
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
        """Number of tokens generated so far, except those that others had generated."""
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
