"""Follows the file of --adapter-registry, whose content registry_content.py reads, and changes it."""

import asyncio
import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import IO

from loraplex_protos.errors import AdapterConflictError, ForbiddenError, UnavailableError
from loraplex_router.access import followed_file
from loraplex_router.access.followed_file import FollowedFile, state_of
from loraplex_router.access.replaced_file import replace_file
from loraplex_router.adapters.registry import Registered, Registry
from loraplex_router.adapters.registry_content import RegistryFileError, faulty, write_registry
from loraplex_router.adapters.registry_process import read_registry_beside
from loraplex_router.adapters.upload_folder import LEFT_SECONDS, UploadFolder
from loraplex_router.vocabulary.references import AdapterReference, Version

WAIT_SECONDS = 5.0  # for a look at the file; what is known is served without one
LOCK_SECONDS, LOCK_PAUSE = 10.0, 0.01  # for other routers that change the file

logger = logging.getLogger(__name__)


class RegistryFile:
    """Keeps a registry as its file says. Raises RegistryFileError if the file is invalid at the start."""

    def __init__(
        self, path: Path, registry: Registry, gone: Callable[[AdapterReference], None], most_upload_bytes: int
    ) -> None:
        """`gone` is called with each version that leaves the registry."""
        self._path = path
        target = path.resolve()
        self.writable = os.access(target.parent, os.W_OK)
        if not self.writable:
            logger.info("the adapter registry cannot be written here: uploads are in this router's memory alone")
        self.uploads = UploadFolder(target.with_name(f"{target.name}.uploads"), most_upload_bytes)
        self._file = FollowedFile(path)
        self._registry = registry
        self._gone = gone
        self._known: tuple[tuple[int, ...], Registered] | None = None  # what the file said in a state of it
        self._changing, self._looking = asyncio.Lock(), asyncio.Lock()
        self._next_look: asyncio.Task[None] | None = None  # which has not begun
        self._tidy_at = 0.0 if self.writable else inf  # by time.monotonic
        registry.update(self._read())

    Edit = Callable[[Registered], Registered]

    async def change(self, edit: Edit) -> list[AdapterReference]:
        """Changes the file as it is now, which another router may have written, and takes up what it says then. Returns
        as Registry.update does.

        Raises what `edit` raises, ForbiddenError if the file may not be written, UnavailableError if it cannot be, as
        on a full disk, AdapterConflictError while it is wrong.
        """
        async with self._changing:
            state, content = await self._file.run(self._rewrite, edit)
            found = self._registry.update(content)
            self._file.seen = state  # only now: if this is cancelled, the file is looked at
            return found

    def _rewrite(self, edit: Edit) -> tuple[tuple[int, ...], Registered]:
        path = self._path.resolve()
        try:
            with self._locked():
                former = self._content()
                changed = edit(former)
                written = write_registry(changed, self._path.suffix == ".json").encode()
                state = state_of(replace_file(path, lambda file: file.write(written)))
                self._known = None if faulty(changed) else (state, changed)  # faults know their lines
                with suppress(OSError):  # it is done the next time
                    self._tidy(changed, former)
                return state, self._opened(self._content())
        except RegistryFileError as error:
            raise AdapterConflictError(f"the registry file is wrong, mend it first: {error.message}") from error
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                why = f"the registry file cannot be written here ({error.strerror}): change it where it comes from"
                raise ForbiddenError(why) from error
            raise UnavailableError(f"the registry file cannot be written: {error.strerror}: try again") from error

    def _read(self) -> Registered:
        """What the file says. Raises RegistryFileError."""
        content = self._content()
        for version in faulty(content):
            logger.error("the adapter %s of the registry cannot be served: %s", version, version.fault)
        opened = self._opened(content)
        if missing := [id for id in _uploads(content) if not self.uploads.has(id)]:
            logger.error("uploads in the adapter registry are not in %s: %s", self.uploads.path, ", ".join(missing))
        return opened

    def _tidy(self, content: Registered, former: Registered) -> None:
        """Leaves the uploads that only the former content names, and deletes those that were left long ago."""
        self._tidy_at = time.monotonic() + LEFT_SECONDS
        ids = {version.origin.id for version in _versions(content) if version.uploaded}  # faulty ones may be mended
        if not self.uploads.keep_only(ids, _uploads(former)):
            self._tidy_at = inf

    def _tidy_again(self) -> None:
        self._tidy_at = time.monotonic() + LEFT_SECONDS
        with suppress(RegistryFileError, UnavailableError, OSError), self._locked():  # it is done the next time
            content = self._content()
            self._tidy(content, content)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """While no other router changes the registry. Raises UnavailableError, OSError."""
        path = self._path.resolve()
        with open(path.with_name(f".{path.name}.lock"), "w") as lock:
            _lock(lock)
            yield

    def _content(self) -> Registered:
        """What the file says now. It is read if it has changed. Raises RegistryFileError."""
        state = self._file.state()
        if self._known is None or self._known[0] != state:
            self._known = state, read_registry_beside(self._path)
        return self._known[1]

    def _opened(self, content: Registered) -> Registered:
        """The content with uploads that can be read. What is as it was is the same object."""
        former = self._registry.content.names
        names = {
            name: self._open(versions)
            if any(version.uploaded for version in versions.values())
            else known
            if (known := former.get(name)) == versions and known is not None
            else versions
            for name, versions in content.names.items()
        }
        opened = replace(content, names=names)
        assert opened.lines is not None  # from now on they are known
        return opened

    def _open(self, versions: Mapping[int, Version]) -> dict[int, Version]:
        return {
            number: replace(version, origin=self.uploads.find(version.origin.id))
            if version.uploaded and not version.fault
            else version
            for number, version in versions.items()
        }

    async def reread(self) -> None:
        """Takes up what the file says now. Raises RegistryFileError."""
        async with self._changing:
            for version in self._registry.update(await self._file.run(self._read)):
                self._gone(version)
            if self.writable:  # whoever has changed the file may be gone when what it left is to be deleted
                self._tidy_at = min(self._tidy_at, time.monotonic() + LEFT_SECONDS)

    async def follow(self) -> None:
        """Looks at the file periodically, until cancelled, and deletes uploads that were left."""
        while True:
            await asyncio.sleep(followed_file.LOOK_SECONDS)
            await self.look()
            if self._tidy_at < time.monotonic():
                async with self._changing:
                    await self._file.run(self._tidy_again)

    async def look(self) -> None:
        """Takes up what the file says, if it has changed. Keeps the old content while the file is invalid, and does not
        wait for long if its disk hangs."""
        if self._next_look is None:
            self._next_look = asyncio.create_task(self._look())
        looking = self._next_look
        await asyncio.wait([looking], timeout=WAIT_SECONDS)
        if looking.done():
            looking.result()

    async def _look(self) -> None:
        async with self._looking:  # so that nobody finds the old content while somebody else takes up the new one
            self._next_look = None  # whoever comes now may have to find what is written later
            state = await self._file.run(self._file.state)
            if state == self._file.seen:
                return
            try:
                await self.reread()
                logger.info("reloaded the adapter registry: %d names", len(self._registry.content.names))
            except RegistryFileError as error:
                self._registry.fault = error.message
                logger.error("keeping the previous adapter registry: %s", error)
            self._file.seen = state


def _lock(file: IO[str]) -> None:
    """Waits until no other router changes the registry. Raises UnavailableError if one does not end."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                why = f"another router has kept the registry file locked for {LOCK_SECONDS:g} seconds: try again"
                raise UnavailableError(why) from None
            time.sleep(LOCK_PAUSE)


def _uploads(content: Registered) -> set[str]:
    """The ids of its uploads."""
    return {version.origin.id for version in _versions(content) if version.uploaded and not version.fault}


def _versions(content: Registered) -> Iterator[Version]:
    return (version for versions in content.names.values() for version in versions.values())
