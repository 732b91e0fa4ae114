"""Requests that run: they are admitted, started or continued from the journal, and end."""

import asyncio
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import zip_longest

from loraplex_protos.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    FieldViolation,
    InvalidRequestError,
    RequestNotFoundError,
    UnavailableError,
    quote,
)
from loraplex_router.access.shared_limits import SharedLimits
from loraplex_router.access.tenant import Tenant, Visit
from loraplex_router.adapters.registry import AT, Registry, reference_to
from loraplex_router.engine.generation import Generation
from loraplex_router.journal.journal import Journal
from loraplex_router.journal.records import Record, Saved
from loraplex_router.journal.stream import Stream
from loraplex_router.replicas.declarations import Declarations
from loraplex_router.replicas.replicas import Replicas
from loraplex_router.service.admission import Admission, Room, check_deadline
from loraplex_router.service.preparation import Arrival, Preparation, replaced
from loraplex_router.service.running import RunningRequests
from loraplex_router.telemetry.telemetry import Telemetry
from loraplex_router.vocabulary.position import Position
from loraplex_router.vocabulary.references import (
    AdapterReference,
    MergedReference,
    Reference,
    Upload,
    Version,
    asked_as,
    ids_of,
    replace_ids,
)
from loraplex_router.vocabulary.request import EmbedRequest, Request
from loraplex_router.vocabulary.volume import Volume

FORMER_SECONDS = 5.0  # how long a request that is resumed may take to end
SPEND_SECONDS = 1.0
SHUT_DOWN = "the server is shutting down: send the request again"
HANDED_OVER = "the server is shutting down: resume the stream, which another router continues"


class Requests:
    """`max_queue` is how many sequences may wait. All methods raise LoraplexError."""

    def __init__(
        self,
        replicas: Replicas,
        registry: Registry,
        declarations: Declarations,
        preparation: Preparation,
        max_queue: int,
        telemetry: Telemetry,
        journal: Journal | None,
        limits: SharedLimits | None,
    ) -> None:
        self.draining = False
        self._replicas = replicas
        self._registry, self._declarations = registry, declarations
        self._preparation = preparation
        self._admission = Admission(replicas, max_queue)
        self._telemetry = telemetry
        self._journal = journal
        self._limits = limits
        self._running = RunningRequests()

    @property
    def max_queue(self) -> int:
        return self._admission.max_queue

    @property
    def idle(self) -> bool:
        return self._admission.idle and self._replicas.idle

    def stream(self, field: str, begun: str = "") -> Stream | None:
        """What a streamed answer is generated with, if streams can be resumed here. `begun`: the id of the last event
        that the client has of a stream that it wants the rest of, from the request's `field`.

        Raises InvalidRequestError if it is not one, or if no stream can be resumed here."""
        if self._journal is None:
            if begun:
                raise InvalidRequestError(FieldViolation(field, "this server does not keep streams: see --store"))
            return None
        try:
            return Stream(self._journal, field, Position.read(begun) if begun else None)
        except ValueError:
            raise InvalidRequestError(FieldViolation(field, "is not the id of one of this server's events")) from None

    async def visit(self, tenant: Tenant, arrived: float, parts: Iterable[Request | EmbedRequest]) -> Visit:
        """What one call takes of the tenant's limits, until `end_visit`. Raises RateLimitedError."""
        names, background = set[str](), True
        for part in parts:
            names.update(ids_of(part.adapter))
            background &= part.background
        if self._limits is None:
            return tenant.begin(arrived, names, background)
        return await self._limits.begin(tenant, arrived, names, background)

    def end_visit(self, visit: Visit) -> None:
        """The call has started all that it will start."""
        visit.end_part()
        if self._limits is not None:
            self._limits.wake()

    def most_waiting(self, background: bool) -> int:
        """How many sequences may wait if there are no others."""
        return self._admission.most(background)

    def room(self, sequences: int, tenant: Tenant, background: bool) -> AbstractContextManager[Room]:
        """A context in which a call's sequences are started. Raises OverloadedError if not all of them may wait now,
        and UnavailableError."""
        if self.draining:
            raise UnavailableError("the server is shutting down")
        return self._admission.room(sequences, tenant, background)

    async def extend(self, room: Room) -> None:
        """Makes room for one more sequence, once it may wait."""
        await self._admission.extend(room)

    async def start(
        self,
        parts: Sequence[Request],
        visit: Visit,
        room: Room,
        arrived: float,
        volume: Volume,
        saved: Sequence[Saved] = (),
    ) -> list[Generation]:
        """Queues the parts of a request together, once all of them can be. They continue what was saved of each."""
        tenant = visit.tenant
        request_id = self._running.reserve(tenant.name, parts[0].request_id)
        try:
            with ExitStack() as held:
                arrival = Arrival(request_id, tenant, arrived, volume, held, names_adapters=len(parts) > 1)
                placed = [
                    await self._preparation.prepare(part, arrival, place, each)
                    for place, (part, each) in enumerate(zip_longest(parts, saved))
                ]
                for part, (generation, lease) in zip(parts, placed, strict=True):
                    check_deadline(part, lease.replica.engine.waited(generation))
                visit.spend(sum(generation.num_prompt for generation, _ in placed), time.monotonic())
                for generation, lease in placed:
                    self._telemetry.queued(generation)
                    if generation.finished:  # it was resumed behind its end
                        self._telemetry.ended(generation)
                    else:
                        lease.submit(generation)
        except BaseException:
            self._running.forget(tenant.name, request_id)
            raise
        self._admission.queued(room, sum(part.n for part in parts))
        generations = [generation for generation, _ in placed]
        self._running.begin(request_id, visit, generations)
        return generations

    def preparing(self, tenant: Tenant) -> AbstractContextManager[object]:
        """A context in which a text is worked on that will not be queued. It waits as a sequence does that is prepared:
        if the queue is full, raises OverloadedError."""
        return self._admission.room(1, tenant, background=False)

    def close(self, generation: Generation) -> None:
        """The reader is done, or gone: ends unfinished sequences."""
        self.cancel(generation)
        self._running.end(generation)
        if self._limits is not None:
            self._limits.wake()
        self._replicas.changes.notify()
        if self._journal is not None:
            self._journal.end(generation)

    async def spend(self) -> None:
        """Counts the tokens of running answers for their keys' limits, from time to time. Runs until cancelled."""
        while True:
            await asyncio.sleep(SPEND_SECONDS)
            self._running.spend()

    @property
    def num_running(self) -> int:
        """The number of requests that have begun and not ended."""
        return len(self._running)

    def is_running(self, request_id: str, tenant: Tenant) -> bool:
        """Whether a request of the tenant's with this id, or the first of several, has begun and not ended."""
        return any(self._running.has(tenant.name, id) for id in (request_id, f"{request_id}-0"))

    def cancel_request(self, request_id: str, tenant: Tenant) -> None:
        """Ends a request of the tenant's; its reader sees it finish as cancelled. If an administrator has none with
        this id, those of others.

        Raises RequestNotFoundError if there is none.
        """
        own = self._running.get(tenant.name, request_id)
        found = [own] if own else self._running.get_all(request_id) if tenant.admin else []
        if not found:
            raise RequestNotFoundError(f"no request {quote(request_id)} is running")
        for running in found:
            for generation in running.generations:
                self.cancel(generation)

    def cancel(self, generation: Generation) -> None:
        """Ends the unfinished sequences of a generation whose client is gone. Its reader sees it finish as cancelled,
        and must still close it."""
        self._replicas.cancel(generation)

    async def hand_over(self) -> None:
        """Ends all generations with an error, which says of those that another router can continue to resume them."""
        if self._journal is not None and self._journal.shared:
            await self._journal.flush()
            for generation in self._running:
                if await self._journal.keep_up(generation):
                    self._replicas.fail(generation, UnavailableError(HANDED_OVER))
        for generation in self._running:
            self._replicas.fail(generation, UnavailableError(SHUT_DOWN))

    def keeping(self, saved: Saved) -> AbstractContextManager[None]:
        """A context in which the content that a stream began with stays in memory, though its former request ends."""
        return self._replicas.keeping(saved.record.digest)

    async def resumed(self, part: Request, tenant: Tenant, saved: Saved) -> Request:
        """The part with what its names and its seed stood for when it began."""
        meant = replace_ids(part.adapter, saved.record.adapters)
        await self._declarations.catch_up(meant)
        tenant.check_adapter(self._registry.named(part.adapter))
        adapter = self._as_begun(meant, saved.record, tenant)
        sampling = part.sampling.model_copy(update={"seed": saved.record.seed})
        request_id = saved.record.request_id
        if self._running.has(tenant.name, request_id):  # the former request cannot end: it waits for its client to read
            request_id = ""
        return replace(part, request_id=request_id, adapter=asked_as(adapter, part.adapter), sampling=sampling)

    def _as_begun(self, meant: Reference | None, record: Record, tenant: Tenant) -> Reference | None:
        """What the versions are that a stream began with. One that is not registered any more is served as long as its
        content is: by another version, or from a replica's memory. Raises AdapterConflictError."""
        try:
            return self._registry.resolve(meant, "", tenant.may_know)
        except AdapterNotFoundError as error:
            assert isinstance(meant, AdapterReference | MergedReference)
            name, number = meant.id.split(AT) if isinstance(meant, AdapterReference) else ("", "")
            found = self._registry.with_content(record.digest)
            if not number or not (found or self._replicas.hold(record.digest)):
                raise AdapterConflictError(replaced(record.adapter)) from error
            origin = found.origin if found else Upload(partial(_refuse, replaced(record.adapter)))
            version = Version(name, int(number), origin, record.digest)
            return replace(reference_to(version), opaque=not tenant.may_know(origin.id))

    async def end_former(self, saved: Sequence[Saved], tenant: Tenant) -> None:
        """Ends the request that is resumed, if it runs here: its client has lost the connection. Later requests may
        have its id, which is the client's own."""
        nonces = {each.record.nonce for each in saved}
        request_id = saved[0].record.request_id if saved else ""  # all have one
        former = self._running.get(tenant.name, request_id)
        if former is not None and not nonces.isdisjoint(generation.nonce for generation in former.generations):
            for generation in former.generations:
                self.cancel(generation)
            with suppress(TimeoutError):
                async with asyncio.timeout(FORMER_SECONDS):
                    await self._replicas.changes.until(lambda: self._running.get(tenant.name, request_id) is not former)

    async def resolve(self, adapter: Reference | None, tenant: Tenant, session: str) -> Reference | None:
        """What the registry says that the name stands for. `session`: equal ones get the same of several versions;
        empty: any. Raises ForbiddenError if the tenant may not use the name."""
        await self._declarations.catch_up(adapter)
        tenant.check_adapter(self._registry.named(adapter))
        return self._registry.resolve(adapter, session or new_session(), tenant.may_know)


def _refuse(why: str) -> Mapping[str, memoryview]:
    raise AdapterConflictError(why)


def new_session() -> str:
    return secrets.token_hex(8)
