"""What is said of an adapter that cannot be served: which one it is, and suggestions if it does not exist."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from difflib import get_close_matches
from heapq import nlargest

from loraplex_protos.errors import (
    AdapterError,
    AdapterForbiddenError,
    AdapterNotFoundError,
    AdapterSourceError,
    LoraplexError,
    quote,
)
from loraplex_router.access.tenant import Tenant
from loraplex_router.adapters.registry import ADMINISTRATORS_SEE
from loraplex_router.vocabulary.references import AdapterReference, Reference, ids_of, parts_of

logger = logging.getLogger(__name__)

MOST = 3
COMPARED = 200  # names at most: comparing is slow
PART = 3  # characters
MOST_WAITING = 4  # requests whose name is compared; further ones get no suggestion
PAUSE = 9  # times as long as the comparison before it took, which holds the interpreter's lock

# What is wrong with a registered adapter, for those who may not know its origin.
FAULTS: Mapping[type[AdapterError], str] = {
    AdapterNotFoundError: "cannot be found in its source",
    AdapterSourceError: "cannot be fetched from its source, or is not what the registry says",
    AdapterForbiddenError: "is not handed out by its source",
}


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


def _of_registered(error: AdapterError, version: AdapterReference, tenant: Tenant) -> str:
    """The message for a tenant about a version in the registry: the error's may name the origin and its digest."""
    whole = f"adapter {version.id} of the registry: {error.message}"
    if type(error) not in FAULTS or tenant.may_know(version.origin.id):
        return whole
    logger.warning("tenant %s: %s", quote(tenant.name), whole)
    return f"adapter {version.id} of the registry {FAULTS[type(error)]}: {ADMINISTRATORS_SEE}"


def _of_part(error: AdapterError, name: str) -> str:
    """The message about one of several adapters, which names it."""
    return error.message if name in error.message else f"adapter {name}: {error.message}"


class Suggestions:
    """Adds names and suggestions to errors. However often clients ask for what does not exist, comparing names is
    done one at a time, and takes a tenth of the time at most."""

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
        """A context in which the adapter is looked up. Errors name it if it is of the registry, or one of several to be
        merged. Suggests only names that the tenant may see."""
        try:
            yield
        except AdapterError as error:
            if error.place is None and type(error) not in FAULTS:
                raise
            adapter = reference if error.place is None else parts_of(reference)[error.place]
            if isinstance(adapter, AdapterReference) and adapter.version is not None:  # not the caller's mistake
                raise type(error)(_of_registered(error, adapter, tenant)) from error
            ids = ids_of(adapter)
            message = error.message if error.place is None else _of_part(error, quote(ids[0]))
            found = await self._similar(ids, tenant) if type(error) in FAULTS else []
            raise type(error)(message + asking(found)) from error

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
