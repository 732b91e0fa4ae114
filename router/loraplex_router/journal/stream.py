"""One streamed answer: what is written down about it, and where it continues if its client comes back."""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import replace

from loraplex_protos.errors import FieldViolation, InvalidRequestError, RequestNotFoundError
from loraplex_router.access.tenant import Tenant
from loraplex_router.engine.delta import Delta
from loraplex_router.engine.generation import Generation
from loraplex_router.engine.output import SequenceOutput
from loraplex_router.engine.replay import ALL_EVENTS
from loraplex_router.journal.journal import Journal
from loraplex_router.journal.records import MAX_SEQUENCES, Record, Saved, decode, fingerprint
from loraplex_router.vocabulary.position import Position, Reached, checksum
from loraplex_router.vocabulary.references import ids_of
from loraplex_router.vocabulary.request import Request

MAX_PROMPT = 2**17  # tokens

UNKNOWN = "the stream is not known here: it ended too long ago, or it was another caller's. Send a new request"
ANOTHER = "is of a stream with another request: send the same request again"


class Stream:
    """`position` is where the client is in the stream that this one continues; None: it is a new one."""

    def __init__(self, journal: Journal, field: str, position: Position | None) -> None:
        self._journal = journal
        self._field = field
        self._id = secrets.token_urlsafe(16)
        self.begun = position
        self._generations = list[Generation]()
        self._outputs = list[SequenceOutput]()
        self._owners = list[Generation]()  # of these
        self._kept = True
        self._written = False  # the beginning of each of them
        self._reached = list[Reached]()  # by the client, in each sequence
        self._last = 0  # the index of the sequence whose delta it got last

    async def find(self, request: Request, model: str, tenant: Tenant) -> list[Saved]:
        """What is known about the generations of the client's request, one for each adapter; nothing of a new stream.
        Raises RequestNotFoundError, InvalidRequestError, UnavailableError."""
        if self.begun is None:
            return []
        found, wanted, first = list[Saved](), fingerprint(request, model), len(self._outputs)
        for number, part in enumerate(request.parts(), len(self._generations)):
            reached = self.begun.reached[first : first + part.n]
            first += part.n
            data = await self._journal.read(f"{self.begun.stream}.{number}")
            try:
                record, tokens = decode(data or b"", part.n)
            except (ValueError, KeyError, TypeError, IndexError):
                raise RequestNotFoundError(UNKNOWN) from None
            if record.tenant != tenant.name:
                raise RequestNotFoundError(UNKNOWN)
            if record.fingerprint != wanted or len(reached) != part.n:
                raise InvalidRequestError(FieldViolation(self._field, ANOTHER))
            found.append(Saved(record, tokens, reached))
        return found

    def keep(self, request: Request, model: str, tenant: Tenant, generations: Sequence[Generation]) -> None:
        """Writes the generations of a request down from now on."""
        wanted = fingerprint(request, model)
        for generation in generations:
            sequence, first = generation.outputs[0].sequence, len(self._outputs)
            self._outputs += generation.outputs
            self._owners += [generation] * len(generation.outputs)
            new = [Reached()] * len(generation.outputs)
            self._reached += self.begun.reached[first : len(self._outputs)] if self.begun else new
            self._kept &= len(self._outputs) <= MAX_SEQUENCES and sequence.prompt_length <= MAX_PROMPT
            if self._kept:
                record = Record(
                    fingerprint=wanted,
                    tenant=tenant.name,
                    request_id=generation.request_id,
                    adapters=ids_of(generation.reference),
                    adapter=generation.adapter_name,
                    version=generation.adapter_version,
                    digest=generation.adapter_digest,
                    prompt=tuple(sequence.tokens[: sequence.prompt_length]),
                    seed=sequence.sampling.seed or 0,
                    nonce=generation.nonce,
                )
                generation.stream = f"{self._id}.{len(self._generations)}"
                self._journal.begin(generation.stream, generation, record)
            self._generations.append(generation)

    async def advance(self, index: int, delta: Delta) -> None:
        """The client gets the next delta of a sequence. Returns once it is written down, or cannot be now."""
        if self._kept and not self._written:
            self._written = all(await asyncio.gather(*map(self._journal.keep_up, self._generations)))
        else:
            await self._journal.keep_up(self._owners[index])
        self._last, former, sequence = index, self._reached[index], self._outputs[index].sequence
        if delta.known:  # it comes again: the client is where it was
            if delta.known == (former.events or ALL_EVENTS):
                self._reached[index] = replace(former, events=None)
            return
        start, end = (sequence.prompt_length + length for length in (former.tokens, delta.generated))
        check = checksum(sequence.tokens[start:end], former.checksum)
        self._reached[index] = Reached(delta.generated, check, former.tokens)

    def position(self, events: int | None = None, afterwards: int = 0) -> str:
        """Where the client is, once it has the last delta, or only this many of its events; or other events after all
        deltas. Empty if others cannot continue the stream from there, since nothing of it has arrived in the store, nor
        was it begun by a stream that has."""
        if self._written:
            id = self._id
        elif self.begun is not None:
            id = self.begun.stream
        else:
            return ""
        reached = [replace(each, before=0) if each.events is None else each for each in self._reached]
        if events is not None:
            reached[self._last] = replace(self._reached[self._last], events=events)
        return str(Position(id, tuple(reached), afterwards))
