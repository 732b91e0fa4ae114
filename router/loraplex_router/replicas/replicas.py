"""The replicas behind this router: placing requests on them, and moving requests when one is lost.

A generation whose replica is lost continues on another one, from the tokens known here: the router has everything that
clients were sent. A generation that crashes replicas is found and ended: see suspects.py. Does not know how replicas
are found or connected to.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, Self

from loraplex_protos.errors import (
    AdapterSourceError,
    GenerationError,
    LoraplexError,
    OverloadedError,
    UnavailableError,
)
from loraplex_router.adapters.faults import explained
from loraplex_router.engine.changes import Changes
from loraplex_router.engine.generation import Generation
from loraplex_router.engine.suspects import acquit
from loraplex_router.replicas.observer import Observer
from loraplex_router.replicas.placement import choose
from loraplex_router.replicas.replica import Replica
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.references import Reference, name_of

RETRY_SECONDS = 0.1
MOST_LOST = 3  # replicas that a request may lose while they stage its adapter or compile its grammar
GIVEN_UP = "{} replicas failed while working on this request, so it was ended: do not send it again"

logger = logging.getLogger(__name__)


class _Move(NamedTuple):
    task: asyncio.Task[None]
    sequences: int  # that are moved


class Replicas:
    """All live replicas. `move_seconds`: how long a generation without a replica, or a request that arrives meanwhile,
    waits for one."""

    def __init__(self, observer: Observer, move_seconds: float) -> None:
        self._observer = observer
        self._move_seconds = move_seconds
        self._replicas: dict[str, Replica] = {}  # by name
        self._moving: dict[Generation, _Move] = {}
        self._num_moving = Counter[str]()  # sequences, by the tenants' names
        self._last_lost: float | None = None  # since when no replica accepts new sequences, by time.monotonic
        self.changes = Changes()
        self.version = 0  # increases when a replica joins, leaves, or starts or stops accepting sequences
        self.ready = asyncio.Event()  # set while any replica accepts new sequences

    def __iter__(self) -> Iterator[Replica]:
        """Those that are there now: replicas may come and go meanwhile."""
        return iter(list(self._replicas.values()))

    @property
    def idle(self) -> bool:
        return not self._moving and all(replica.engine.idle for replica in self)

    @property
    def num_waiting(self) -> int:
        """Number of sequences that are queued or without a replica."""
        return self._num_moving.total() + sum(replica.scheduler.num_waiting for replica in self)

    def waiting_by_tenant(self) -> Counter[str]:
        """The same, by the tenants' names."""
        waiting = self._num_moving.copy()
        for replica in self:
            waiting.update(replica.scheduler.waiting_by_tenant())
        return waiting

    # ---- replicas come and go ----------------------------------------------------------------------------------

    def add(self, replica: Replica) -> None:
        self._replicas[replica.name] = replica
        self._observer.watch(replica)
        self._update()

    def drain(self, replica: Replica) -> None:
        """Its shards are about to stop: running sequences continue there, waiting ones go elsewhere if possible."""
        replica.stopping = True
        self._take_nothing_new(replica)

    def set_silent(self, name: str, silent: bool) -> None:
        """Its shards have not answered for a while, or answer again. A silent replica is treated like a stopping
        one."""
        if replica := self._replicas.get(name):
            replica.silent = silent
            if silent:
                self._take_nothing_new(replica)
            else:
                self._update()

    def _take_nothing_new(self, replica: Replica) -> None:
        self._update()
        if self.ready.is_set():
            self.move(replica.engine.release(started=False))

    def remove(self, replica: Replica) -> None:
        """Its shards are gone."""
        replica.stopping = True
        del self._replicas[replica.name]
        self._observer.forget(replica.name)
        replica.adapters.close()
        self._update()
        guilty = replica.engine.loss(busy=replica.busy).accuse()
        lost = replica.engine.release(started=True)
        convicted = next((g for g in lost if any(output.sequence is guilty for output in g.outputs)), None)
        if guilty and convicted:
            logger.error("ended request %s: it crashed %d replicas", convicted.request_id, guilty.losses)
            self._fail(convicted, GenerationError(GIVEN_UP.format(guilty.losses)))
            self._acquit_all()
            acquit(output.sequence for generation in lost for output in generation.outputs)
        self.move(generation for generation in lost if generation is not convicted)

    def _update(self) -> None:
        if any(replica.accepting for replica in self):
            self.ready.set()
        elif self.ready.is_set():
            self.ready.clear()
            self._last_lost = time.monotonic()
        self.version += 1
        self.changes.notify()

    # ---- requests --------------------------------------------------------------------------------------------

    def choose(self, reference: Reference | None, without: Iterable[Replica] = ()) -> Replica:
        """The replica for a request with this adapter. Raises UnavailableError if no replica accepts requests."""
        replicas = [replica for replica in self if replica.accepting and replica not in without]
        if not replicas:
            raise UnavailableError("no replica is ready: try again later")
        return self._replicas[choose(name_of(reference), [replica.candidate(reference) for replica in replicas]).name]

    def hold(self, digest: str) -> bool:
        """Whether any replica has this content in memory."""
        return any(replica.adapters.held(digest) for replica in self)

    @contextmanager
    def keeping(self, digest: str) -> Iterator[None]:
        """A context in which content stays in the memory where it is, even if it was about to leave."""
        held = [adapter for replica in self if (adapter := replica.adapters.held(digest)) is not None]
        for adapter in held:
            adapter.leases += 1
        try:
            yield
        finally:
            for adapter in held:
                adapter.leases -= 1
            self.changes.notify()

    async def place(
        self,
        reference: Reference | None,
        grammar: Grammar | None = None,
        beside: "Lease | None" = None,
        tenant: str = "",
        digest: str = "",
    ) -> "Lease":
        """Reserves a place for a tenant's request, with the adapter staged and the grammar compiled. The caller must
        close it. With `beside`, on the same replica if possible; with a `digest`, with this content if any has it.

        If the last replica was just lost, waits for one as long as its generations do. Raises
        UnavailableError if no replica can take it, AdapterError with the reason if the adapter cannot be served,
        InvalidRequestError if adapters cannot be merged or the grammar cannot be compiled.
        """
        began, lost = time.monotonic(), list[Replica]()
        while True:
            try:
                return await self._place_now(reference, grammar, lost, tenant, beside, digest)
            except UnavailableError:
                since = began if self.ready.is_set() else self._last_lost
                if since is None or since + self._move_seconds < time.monotonic():
                    raise
            with suppress(TimeoutError):
                async with asyncio.timeout(since + self._move_seconds - time.monotonic()):
                    await asyncio.sleep(RETRY_SECONDS)
                    await self.ready.wait()

    async def _place_now(
        self,
        reference: Reference | None,
        grammar: Grammar | None,
        lost: list[Replica],
        tenant: str,
        beside: "Lease | None" = None,
        digest: str = "",
    ) -> "Lease":
        """Appends to `lost` the replicas lost meanwhile, possibly because of the adapter or the grammar."""
        while True:
            possible = [replica for replica in self if replica.accepting and replica not in lost]
            possible = [replica for replica in possible if replica.adapters.held(digest)] or possible
            together = beside is not None and beside.replica in possible
            others = [replica for replica in self if replica not in possible]
            replica = beside.replica if beside and together else self.choose(reference, without=others)
            held = replica.adapters.held(digest)
            try:
                with replica.preparing():
                    lease = Lease(self, replica, held or await replica.adapters.resolve(reference, tenant))
                    await lease.prepare(grammar, tenant)
            except UnavailableError as error:
                logger.warning("replica %s: %s", replica.name, error)
                lost.append(replica)
                if len(lost) == MOST_LOST:
                    raise GenerationError(GIVEN_UP.format(len(lost))) from error
                continue
            if replica.accepting:
                return lease
            lease.close()

    def cancel(self, generation: Generation) -> None:
        """Ends its unfinished sequences; their blocks are free by the next step. Does nothing if it has ended."""
        for replica in self:
            replica.engine.cancel(generation)
        if self._end_move(generation):
            generation.cancel()
            self._observer.ended(generation)

    def fail(self, generation: Generation, error: LoraplexError) -> None:
        """Ends it with an error. Does nothing if it has ended."""
        for replica in self:
            replica.engine.fail(generation, error)
        if self._end_move(generation):
            self._fail(generation, error)

    def fail_all(self, error: LoraplexError) -> None:
        """Ends all waiting and running generations."""
        for replica in self:
            for generation in replica.engine.release(started=True):
                self._fail(generation, error)
        for generation in list(self._moving):
            self._end_move(generation)
            self._fail(generation, error)

    # ---- from a lost replica to another ------------------------------------------------------------------------

    def move(self, generations: Iterable[Generation]) -> None:
        """Continues the generations on other replicas."""
        for generation in generations:
            unfinished = len(generation.unfinished)
            self._moving[generation] = _Move(asyncio.create_task(self._move(generation)), unfinished)
            self._num_moving[generation.tenant] += unfinished

    def _end_move(self, generation: Generation, cancel: bool = True) -> bool:
        """Returns whether it was moving."""
        if (move := self._moving.pop(generation, None)) is None:
            return False
        self._num_moving[generation.tenant] -= move.sequences
        if not self._num_moving[generation.tenant]:
            del self._num_moving[generation.tenant]
        if cancel:
            move.task.cancel()
        return True

    def _acquit_all(self) -> None:
        """Clears all suspects, once the culprit is found."""
        running = [generation for replica in self for generation in replica.engine.generations]
        for generation in (*running, *self._moving):
            acquit(output.sequence for output in generation.outputs)

    async def _move(self, generation: Generation) -> None:
        try:
            lease = await self._place_again(generation)
        except LoraplexError as error:
            self._fail(generation, explained(error, generation.reference))
        except Exception:
            logger.exception("cannot move a request to another replica")
            self._fail(generation, UnavailableError("the router failed; its log has the details"))
        else:
            with lease:
                generation.restart(lease.adapter)
                lease.replica.engine.submit(generation)
        self._end_move(generation, cancel=False)
        self.changes.notify()

    async def _place_again(self, generation: Generation) -> "Lease":
        """What may pass is waited for: an adapter that cannot be fetched now, or has no room, too."""
        grammar, lost = generation.outputs[0].sequence.grammar, list[Replica]()
        lease, last = None, LoraplexError("no replacement became ready in time")
        try:
            async with asyncio.timeout(self._move_seconds):
                while lease is None:
                    await self.ready.wait()
                    try:
                        lease = await self._place_now(generation.reference, grammar, lost, generation.tenant)
                    except UnavailableError:
                        await asyncio.sleep(RETRY_SECONDS)
                    except (OverloadedError, AdapterSourceError) as error:
                        last = error
                        await asyncio.sleep(RETRY_SECONDS)
        except TimeoutError:
            told = explained(last, generation.reference).message
            raise UnavailableError(f"the shards were lost, and {told}") from None
        if lease.adapter.digest != generation.adapter.digest:
            lease.close()
            raise UnavailableError("the shards were lost, and the adapter's content has changed since")
        return lease

    def _fail(self, generation: Generation, error: LoraplexError) -> None:
        generation.fail(error)
        self._observer.ended(generation)


class Lease:
    """A request's place on a replica. Until it is closed, the adapter stays in host memory, and the request counts
    towards the replica's load."""

    def __init__(self, replicas: Replicas, replica: Replica, adapter: Adapter) -> None:
        self._replicas = replicas
        self.replica = replica
        self.adapter = adapter
        self.warnings: tuple[str, ...] = ()  # about the grammar
        replica.leases += 1
        adapter.leases += 1

    async def prepare(self, grammar: Grammar | None, tenant: str) -> None:
        """Has the grammar compiled for the adapter, when it is the tenant's turn. Closes the lease and raises if that
        fails."""
        if grammar is not None:
            try:
                async with self.replica.compiling.taken(tenant):
                    self.warnings = await self.replica.shards.compile_grammar(grammar, self.adapter)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, generation: Generation) -> None:
        """Queues it here or, if the replica no longer accepts sequences, on another one."""
        if self.replica.accepting:
            self.replica.engine.submit(generation)
        else:
            self._replicas.move((generation,))

    def close(self) -> None:
        self.replica.leases -= 1
        self.adapter.leases -= 1
        self._replicas.changes.notify()
