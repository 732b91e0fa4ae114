"""Operations on adapters: a listing for everyone, the rest for administrators, each with a line in the audit log."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from loraplex_protos.generation_pb2 import ADAPTER_STATE_ALIAS as ALIAS
from loraplex_protos.generation_pb2 import ADAPTER_STATE_REGISTERED as REGISTERED
from loraplex_protos.generation_pb2 import AdapterStatus
from loraplex_router.access.audit import audited
from loraplex_router.access.keys import Keys
from loraplex_router.access.tenant import Tenant
from loraplex_router.adapters.suggestions import Suggestions
from loraplex_router.replicas.administration import Administration
from loraplex_router.replicas.declarations import Declarations
from loraplex_router.replicas.listing import AT_A_TIME, AdapterPage
from loraplex_router.replicas.uploads import Announcement, Uploads
from loraplex_router.text.model import Model
from loraplex_router.vocabulary.adapter import OTHER_BASE_NAMES
from loraplex_router.vocabulary.checks import check_reference
from loraplex_router.vocabulary.references import AdapterReference
from loraplex_router.vocabulary.violations import Violations

N = TypeVar("N", AdapterReference, AdapterReference | str)

PAGE = 1000
DIGEST = re.compile(r"[0-9a-f]{64}")


class Adapters:
    """`key` is the caller's API key. `model` returns the served model, or raises UnavailableError until it is known.
    All calls raise LoraplexError."""

    def __init__(
        self,
        keys: Keys,
        administration: Administration,
        uploads: Uploads,
        declarations: Declarations,
        suggestions: Suggestions,
        model: Callable[[], Model],
    ) -> None:
        self._keys = keys
        self._administration = administration
        self._registry = administration.registry
        self._uploads = uploads
        self._declarations = declarations
        self._suggestions = suggestions
        self._model = model

    @property
    def registers(self) -> bool:
        """Whether there is a registry file."""
        return self._declarations.possible

    def has_name(self, name: str, key: str | None) -> bool:
        """Whether the registry file or an upload has this name. For administrators."""
        self._keys.administrator(key)
        return self._registry.has(name)

    async def list(self, key: str | None = None, after: str = "", limit: int = 0, only: str = "") -> AdapterPage:
        """Adapters that are staged or in the adapter directory, as far as the caller may use them: those after the id
        `after`, and at most `limit`, but for those with the same id. 0: all of them. `only`: those with this id."""
        tenant = self._keys.tenant(key)
        page = await self._administration.listing.page(tenant, after, limit, only)
        for number, status in enumerate(page.adapters):
            self._remarked(status)
            if status.state in (REGISTERED, ALIAS) and self._registry.fault:
                why = self._registry.fault if tenant.admin else "the server's log says why"
                status.warnings.append(f"the registry file has changed since, and was refused: {why}")
            if number % AT_A_TIME == 0:
                await asyncio.sleep(0)  # let other tasks run
        return page

    async def pages(self, key: str | None = None, after: str = "") -> AsyncIterator[AdapterPage]:
        """All that `list` has, some at a time: many thousands at once would take noticeable time to be given back."""
        more = True
        while more:
            page = await self.list(key, after, PAGE)
            yield page
            more, after = page.more, page.adapters[-1].id if page.more else ""

    async def lists(self, id: str, key: str | None = None) -> bool:
        """Whether `list` has this id for the caller."""
        return await self._administration.listing.lists(id, self._keys.tenant(key))

    async def load(self, reference: AdapterReference, key: str | None = None) -> AdapterStatus:
        """Rereads the adapter's source and stages its current content. For administrators."""
        with self._administered("load", reference, key) as tenant:
            async with self._suggestions.for_missing(reference, tenant):
                return self._remarked(await self._administration.load(await self._resolved(reference)))

    async def upload(
        self,
        upload: Announcement,
        read: Callable[[], Awaitable[Mapping[str, memoryview]]],
        key: str | None = None,
    ) -> AdapterStatus:
        """Makes uploaded files the newest version of a name. For administrators. `read` is called once the announcement
        is accepted. Raises AdapterConflictError if the name is not as expected."""
        with audited("upload", self._keys, key, adapter=AdapterReference(upload.name)):
            self._keys.administrator(key)
            async with self._uploads.announced(upload):
                return self._remarked(await self._uploads.put(upload, await read()))

    async def register(
        self, name: str, reference: AdapterReference, expected_version: int | None, key: str | None = None
    ) -> AdapterStatus:
        """Makes an adapter the newest version of a name in the registry file. For administrators."""
        with audited("register", self._keys, key, adapter=AdapterReference(name)):
            tenant = self._keys.administrator(key)
            self._check_named(reference)
            async with self._suggestions.for_missing(reference, tenant):
                return self._remarked(await self._declarations.register(name, reference, expected_version))

    async def set_alias(
        self,
        name: str,
        targets: Mapping[str, float],
        expected: Mapping[str, float] | None,
        key: str | None = None,
    ) -> AdapterStatus:
        """Makes a name in the registry file stand for others. For administrators."""
        with audited("alias", self._keys, key, adapter=AdapterReference(name)):
            self._keys.administrator(key)
            return self._remarked(await self._declarations.set_alias(name, targets, expected))

    async def remove(self, name: str, expected_version: int | None, key: str | None = None) -> None:
        """Removes an uploaded name, or what the registry file declares. For administrators."""
        with audited("remove", self._keys, key, adapter=AdapterReference(name)):
            self._keys.administrator(key)
            if self._declarations.keep_uploads or self._registry.declares(self._registry.bare(name)):
                await self._declarations.remove(name, expected_version)
            else:
                self._uploads.remove(name, expected_version)

    async def unload(self, name: AdapterReference | str, wait: bool = False, key: str | None = None) -> None:
        """Frees its memory on every replica. For administrators. `name` is a reference or a digest.

        Raises AdapterNotFoundError if it is not loaded and, without `wait`, AdapterInUseError while sequences need it.
        """
        with self._administered("unload", name, key):
            await self._administration.unload(await self._resolved(name), wait)

    async def pin(self, name: AdapterReference | str, key: str | None = None) -> AdapterStatus:
        """Loads an adapter onto one replica's device, where it stays until it is unpinned or unloaded. Returns
        once it is there. For administrators.

        Raises AdapterNotFoundError for a digest that is not loaded, AdapterPinsError if no more can be pinned.
        """
        reference = name if isinstance(name, AdapterReference) else None
        with self._administered("pin", name, key) as tenant:
            async with self._suggestions.for_missing(reference, tenant):
                return self._remarked(await self._administration.pin(await self._resolved(name)))

    async def unpin(self, name: AdapterReference | str, key: str | None = None) -> AdapterStatus:
        """Lets it leave the device when others need its slot. For administrators.

        Raises AdapterNotFoundError if it is not loaded.
        """
        with self._administered("unpin", name, key):
            return self._remarked(self._administration.unpin(await self._resolved(name)))

    @contextmanager
    def _administered(self, action: str, name: AdapterReference | str, key: str | None) -> Iterator[Tenant]:
        """Checks the caller and the name, and logs the outcome."""
        named = {"digest" if isinstance(name, str) else "adapter": name}
        with audited(action, self._keys, key, **named):
            tenant = self._keys.administrator(key)
            self._check_named(name)
            yield tenant

    async def _resolved(self, name: N) -> N:
        """The version that a registered name stands for; a digest as it is."""
        if not isinstance(name, AdapterReference):
            return name
        await self._declarations.catch_up(name)
        return self._registry.resolve_one(name, None)

    def _check_named(self, name: AdapterReference | str) -> None:
        found = Violations()
        if isinstance(name, AdapterReference):
            check_reference(name, self._model().info.adapter_sources, found)
        else:
            written = DIGEST.fullmatch(name) is not None
            found.check(written, "digest", "must be as in a listing: 64 characters of 0-9 a-f")
        found.raise_any()

    def _remarked(self, status: AdapterStatus) -> AdapterStatus:
        """With what activates it as text, and a warning if the model has its name."""
        if status.invocation_token_ids:
            status.invocation = self._model().tokenizer.verbatim.decode(list(status.invocation_token_ids))
        names = self._model().names
        if status.id in (*names, *OTHER_BASE_NAMES):
            name = f"{names[0]}:{status.id}"
            status.warnings.append(f"on /v1 its name means the base model: request it as {name}, or rename it")
        return status
