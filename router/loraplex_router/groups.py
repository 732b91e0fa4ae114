"""The groups behind this router: which of them a request goes to, and what becomes of it if that one is lost.

A generation whose group is lost goes on in another one, from the tokens that were known here: the router holds all that
a client was promised. One that groups are lost of is found out, and ended: see suspects.py. Knows nothing of how groups
are found or connected to.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

from loraplex_protos.errors import GenerationError, LoraplexError, UnavailableError
from loraplex_router.adapters.pool import Adapter
from loraplex_router.adapters.references import Reference, name_of
from loraplex_router.grammar import Grammar
from loraplex_router.group import Group
from loraplex_router.output import Generation
from loraplex_router.placement import choose
from loraplex_router.suspects import acquit
from loraplex_router.telemetry.telemetry import Telemetry

RETRY_SECONDS = 0.1
MOST_LOST = 3  # groups that a request can lose while they stage its adapter or compile its grammar
GIVEN_UP = "{} groups of shards were lost while they worked on this request, so it was ended: do not send it again"

logger = logging.getLogger(__name__)


class Groups:
    """All live groups. `move_seconds` is how long a generation without a group waits for one; requests that come
    meanwhile wait as long."""

    def __init__(self, telemetry: Telemetry, move_seconds: float) -> None:
        self._telemetry = telemetry
        self._move_seconds = move_seconds
        self._groups: dict[str, Group] = {}  # by name
        self._moving: dict[Generation, asyncio.Task[None]] = {}
        self._last_lost: float | None = None  # since when no group takes new sequences, by time.monotonic
        self._changes = 0
        self._change = asyncio.Event()  # set at the next one, which makes a new event
        self.ready = asyncio.Event()  # while any group takes new sequences

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    @property
    def idle(self) -> bool:
        return not self._moving and all(group.engine.idle for group in self)

    @property
    def num_waiting(self) -> int:
        """Sequences that are queued, or without a group."""
        moving = sum(len(generation.unfinished) for generation in self._moving)
        return moving + sum(group.scheduler.num_waiting for group in self)

    async def changed(self, since: int) -> int:
        """How often groups have come, gone or stopped taking sequences, as soon as it is not `since` any more."""
        while self._changes == since:
            await self._change.wait()
        return self._changes

    # ---- groups come and go ----------------------------------------------------------------------------------

    def add(self, group: Group) -> None:
        self._groups[group.name] = group
        self._telemetry.watch(group)
        self._update()

    def close(self, group: Group) -> None:
        """Its shards want to stop: what it began goes on there, what waits goes elsewhere if there is an elsewhere."""
        group.stopping = True
        self._take_nothing_new(group)

    def set_silent(self, name: str, silent: bool) -> None:
        """Its shards have not answered for a while, or do again. Meanwhile it is as if they wanted to stop."""
        if group := self._groups.get(name):
            group.silent = silent
            if silent:
                self._take_nothing_new(group)
            else:
                self._update()

    def _take_nothing_new(self, group: Group) -> None:
        self._update()
        if self.ready.is_set():
            self._move_all(group.engine.release(started=False))

    def remove(self, group: Group) -> None:
        """Its shards are gone."""
        group.stopping = True
        del self._groups[group.name]
        self._telemetry.forget(group.name)
        group.adapters.close()
        self._update()
        guilty = group.engine.loss(busy=group.busy).accuse()
        lost = group.engine.release(started=True)
        convicted = next((g for g in lost if any(output.sequence is guilty for output in g.outputs)), None)
        if guilty and convicted:
            logger.error("request %s is ended: %d groups died of it", convicted.request_id, guilty.losses)
            self._fail(convicted, GenerationError(GIVEN_UP.format(guilty.losses)))
            self._acquit_all()
            acquit(output.sequence for generation in lost for output in generation.outputs)
        self._move_all(generation for generation in lost if generation is not convicted)

    def _update(self) -> None:
        if any(group.accepting for group in self):
            self.ready.set()
        elif self.ready.is_set():
            self.ready.clear()
            self._last_lost = time.monotonic()
        self._changes += 1
        self._change.set()
        self._change = asyncio.Event()

    # ---- requests --------------------------------------------------------------------------------------------

    def choose(self, reference: Reference | None, without: Iterable[Group] = ()) -> Group:
        """Where a request with this adapter goes. Raises UnavailableError if no group takes any."""
        groups = [group for group in self if group.accepting and group not in without]
        if not groups:
            raise UnavailableError("no group of shards is ready: try again later")
        return self._groups[choose(name_of(reference), [group.candidate(reference) for group in groups]).name]

    async def place(self, reference: Reference | None, grammar: Grammar | None) -> tuple[Group, Adapter]:
        """The group for a request, with the adapter staged and the grammar compiled there. The caller must submit the
        request before it awaits anything else.

        Where the last group was lost just now it waits for one, until what ran there waits no more. Raises
        UnavailableError if no group can take it, AdapterError with the reason if the adapter cannot be served,
        InvalidRequestError if adapters cannot be merged or the grammar cannot be compiled.
        """
        began, lost = time.monotonic(), list[Group]()
        while True:
            try:
                return await self._place_now(reference, grammar, lost)
            except UnavailableError:
                since = began if self.ready.is_set() else self._last_lost
                if since is None or since + self._move_seconds < time.monotonic():
                    raise
            with suppress(TimeoutError):
                async with asyncio.timeout(since + self._move_seconds - time.monotonic()):
                    await asyncio.sleep(RETRY_SECONDS)
                    await self.ready.wait()

    async def _place_now(
        self, reference: Reference | None, grammar: Grammar | None, lost: list[Group]
    ) -> tuple[Group, Adapter]:
        """Adds to the groups that were lost meanwhile: maybe because of the adapter or the grammar."""
        while True:
            group = self.choose(reference, without=lost)
            try:
                with group.expecting():
                    if grammar is not None:
                        await group.shards.compile_grammar(grammar)
                    adapter = await group.adapters.resolve(reference)
            except UnavailableError as error:
                logger.warning("group %s: %s", group.name, error)
                lost.append(group)
                if len(lost) == MOST_LOST:
                    raise GenerationError(GIVEN_UP.format(len(lost))) from error
                continue
            if group.accepting:
                return group, adapter

    def cancel(self, generation: Generation) -> None:
        """Ends what still runs of it; its blocks are free by the next step. Does nothing if it has ended."""
        for group in self:
            group.engine.cancel(generation)
        if task := self._moving.pop(generation, None):
            task.cancel()
            generation.cancel()
            self._telemetry.ended(generation)

    def fail_all(self, error: LoraplexError) -> None:
        """Ends everything that waits or runs."""
        for group in self:
            for generation in group.engine.release(started=True):
                self._fail(generation, error)
        for generation, task in list(self._moving.items()):
            task.cancel()
            self._fail(generation, error)
        self._moving.clear()

    # ---- from a lost group to another ------------------------------------------------------------------------

    def _move_all(self, generations: Iterable[Generation]) -> None:
        for generation in generations:
            self._moving[generation] = asyncio.create_task(self._move(generation))

    def _acquit_all(self) -> None:
        """What the groups died of is found."""
        running = [generation for group in self for generation in group.engine.generations]
        for generation in (*running, *self._moving):
            acquit(output.sequence for output in generation.outputs)

    async def _move(self, generation: Generation) -> None:
        try:
            async with asyncio.timeout(self._move_seconds):
                group, adapter = await self._place_again(generation)
        except TimeoutError:
            self._fail(generation, UnavailableError("the shards were lost, and no others came in time"))
        except LoraplexError as error:
            self._fail(generation, error)
        except Exception:
            logger.exception("a request cannot be moved to another group")
            self._fail(generation, UnavailableError("the router failed; its log has the details"))
        else:
            generation.restart(adapter)
            group.engine.submit(generation)
        del self._moving[generation]

    async def _place_again(self, generation: Generation) -> tuple[Group, Adapter]:
        grammar, lost = generation.outputs[0].sequence.grammar, list[Group]()
        while True:
            await self.ready.wait()
            try:
                group, adapter = await self._place_now(generation.reference, grammar, lost)
            except UnavailableError:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if adapter.digest != generation.adapter.digest:
                raise UnavailableError("the shards were lost, and the adapter's content is not what it was")
            return group, adapter

    def _fail(self, generation: Generation, error: LoraplexError) -> None:
        generation.fail(error)
        self._telemetry.ended(generation)
