"""Which adapters a client may have meant that asked for one that does not exist."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from difflib import get_close_matches
from heapq import nlargest

from loraplex_protos.errors import AdapterError, LoraplexError
from loraplex_router.access.tenant import Tenant
from loraplex_router.adapters.faults import FAULTS, adapter_of, explained, is_registered
from loraplex_router.vocabulary.references import Reference, ids_of

MOST = 3
COMPARED = 200  # names at most: comparing is slow
PART = 3  # characters
MOST_WAITING = 4  # requests whose name is compared; further ones get no suggestion
PAUSE = 9  # times as long as the comparison before it took, which holds the interpreter's lock


def similar(name: str, names: Iterable[str]) -> list[str]:
    """The most similar names, best first; few, or none."""
    wanted = name.casefold()
    known = {other.casefold(): other for other in names}
    plausible = [other for other in known if abs(len(other) - len(wanted)) <= len(wanted) // 2 + 1]
    if len(plausible) > COMPARED:  # of thousands, those that share the most parts with it
        parts = {wanted[start : start + PART] for start in range(len(wanted) - PART + 1)}
        plausible = nlargest(COMPARED, plausible, key=lambda other: sum(part in other for part in parts))
    folder = wanted.rpartition("/")[2]  # a name without its org, or with another one
    found = [other for other in known if other.rpartition("/")[2] == folder]
    return [known[other] for other in dict.fromkeys([*found, *get_close_matches(wanted, plausible, MOST)])][:MOST]


def asking(names: Sequence[str]) -> str:
    """The end of an error's message; empty if there is nothing to suggest."""
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""


class Suggestions:
    """Adds suggestions to errors. However often clients ask for what does not exist, comparing names is done one at a
    time, and takes a tenth of the time at most."""

    def __init__(
        self, names: Callable[[], Awaitable[Mapping[str, Collection[str] | None]]], bare: Callable[[str], str]
    ) -> None:
        """`names` returns the names of the available adapters, with the tenants that alone know of each, None: all do;
        `bare` what of a name permissions are for."""
        self._names = names
        self._bare = bare
        self._thread = ThreadPoolExecutor(1, "suggestions")
        self._turn = asyncio.Lock()
        self._comparing = set[asyncio.Task[list[str]]]()

    @asynccontextmanager
    async def for_missing(self, reference: Reference | None, tenant: Tenant) -> AsyncIterator[None]:
        """A context in which the adapter is looked up. Its errors are explained, with suggestions of names that the
        tenant may see."""
        try:
            yield
        except AdapterError as error:
            told, adapter = explained(error, reference), adapter_of(error, reference)
            suggests = type(error) in FAULTS and not is_registered(adapter)
            found = await self._similar(ids_of(adapter), tenant) if suggests else []
            raise type(error)(told.message + asking(found)) from error

    async def _similar(self, ids: Sequence[str], tenant: Tenant) -> list[str]:
        try:
            known = await self._names()
        except LoraplexError:  # no replica can list adapters
            return []

        def is_seen(name: str) -> bool:
            return tenant.may_see(self._bare(name), known[name])

        missing = next((id for id in ids if id not in known or not is_seen(id)), None)
        if missing is None:
            return []
        if len(self._comparing) >= MOST_WAITING:
            return []
        task = asyncio.create_task(self._compare(missing, filter(is_seen, known)))
        self._comparing.add(task)
        task.add_done_callback(self._comparing.discard)
        return await asyncio.shield(task)  # a caller that leaves does not end its turn: the thread goes on

    async def _compare(self, missing: str, usable: Iterable[str]) -> list[str]:
        await self._turn.acquire()
        loop, began = asyncio.get_running_loop(), time.monotonic()
        try:
            return await loop.run_in_executor(self._thread, similar, missing, usable)
        finally:
            loop.call_later(PAUSE * (time.monotonic() - began), self._turn.release)
