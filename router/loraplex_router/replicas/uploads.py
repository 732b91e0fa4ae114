"""Adapters that administrators upload. The router sends their files to the shards of every replica, also of one that
joins later. It keeps them beside the registry file, for all routers that read this file, or in its own memory if there
is no registry file that can be written. What was in memory is forgotten after a restart: requests for it are refused.
"""

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.adapter_names import RULE, is_name
from loraplex_protos.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    FieldViolation,
    InvalidRequestError,
    OverloadedError,
    RateLimitedError,
    quote,
)
from loraplex_router.adapters.registry import AT, reference_to
from loraplex_router.replicas.administration import Administration
from loraplex_router.replicas.declarations import Declarations, expect_older, expect_version
from loraplex_router.replicas.replicas import Replicas
from loraplex_router.vocabulary.references import Upload, Version

PER_MINUTE = 1200
BURST = 60


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a client says before it uploads."""

    name: str
    size: int  # bytes of all files together
    expected_version: int | None = None  # that the name must have now; 0: none


class Uploads:
    """`most_bytes`: how much memory uploads may take while they arrive, and if they are kept there, until the last
    sequence that uses them has ended."""

    def __init__(
        self,
        administration: Administration,
        declarations: Declarations,
        replicas: Replicas,
        most_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._administration = administration
        self._declarations = declarations
        self._registry = administration.registry
        self._replicas = replicas
        self._most = self._free = most_bytes
        self._clock = clock
        self._last = 0
        self._allowance, self._allowed_at = float(BURST), clock()

    @asynccontextmanager
    async def announced(self, upload: Announcement) -> AsyncIterator[None]:
        """A context in which an upload arrives, and room is kept for it.

        Raises InvalidRequestError, AdapterConflictError, RateLimitedError, or OverloadedError if there is no room.
        """
        name, size = upload.name, upload.size
        if not is_name(name) or AT in name:
            raise InvalidRequestError(FieldViolation("name", f"is not valid: {RULE}; it does not contain {AT}"))
        if size > self._most:
            why = f"have {size} bytes; uploads may have {self._most} (--adapter-uploads-mib)"
            raise InvalidRequestError(FieldViolation("files", why))
        await self._declarations.look()
        self._check(upload)
        self._count()
        if self._declarations.keep_uploads:
            await self._declarations.check_room(size)
        if size > self._free:
            raise OverloadedError(f"the upload has {size} bytes, of which only {self._free} are free: try again later")
        self._free -= size
        try:
            yield
        except BaseException:
            self._give_back(size)
            raise
        if self._declarations.keep_uploads:
            self._give_back(size)

    async def put(self, upload: Announcement, files: Mapping[str, memoryview]) -> pb.AdapterStatus:
        """Stages an announced upload on all replicas, and makes it the newest version of its name.

        Raises AdapterInvalidError if it cannot be served, AdapterConflictError if somebody else was faster.
        """
        if not self._declarations.keep_uploads:
            await self._check_directory(upload.name)
        await self._declarations.look()
        # No number is used twice, after a restart or by another router either, whose clock may have been ahead.
        newest = self._registry.find(upload.name)
        number = self._last = max(self._last + 1, int(self._clock() * 1000), newest.number + 1 if newest else 0)
        content = Upload(lambda: files)
        version = Version(upload.name, number, content)
        reference = reference_to(version)
        try:
            with await self._replicas.place(reference) as first:
                others = [replica for replica in self._replicas if replica.accepting and replica is not first.replica]
                # One where this fails now is sent it again by the first request.
                await asyncio.gather(*(other.adapters.resolve(reference) for other in others), return_exceptions=True)
                status = self._administration.loaded(reference)
            if self._declarations.keep_uploads:
                await self._declarations.add_upload(replace(version, digest=status.digest), upload.expected_version)
            else:
                self._add(version, upload)
        except BaseException:
            self._administration.retire(reference)
            raise
        return status

    def _add(self, version: Version, upload: Announcement) -> None:
        """Keeps it in memory."""
        self._check(upload, version.number)
        former = self._registry.uploads.get(upload.name)
        self._registry.uploads[upload.name] = version
        weakref.finalize(version.origin, self._give_back, upload.size)
        if former is not None:
            self._administration.retire(reference_to(former))

    def remove(self, name: str, expected_version: int | None) -> None:
        """Removes an uploaded name from memory. Raises AdapterNotFoundError, or AdapterConflictError if it is not as
        expected."""
        self._check(Announcement(name, 0, expected_version))
        version = self._registry.uploads.pop(name, None)
        if version is None:
            raise AdapterNotFoundError(f"no adapter {quote(name)} has been uploaded")
        self._administration.retire(reference_to(version))

    def _check(self, upload: Announcement, number: int | None = None) -> None:
        """Checks the name as it is now. `number`: the version that would be its newest one."""
        name, newest = quote(upload.name), self._registry.find(upload.name)
        if upload.name in self._registry.content.aliases:
            raise AdapterConflictError(f"{name} is an alias: use another name, or remove it first")
        if not self._declarations.keep_uploads and self._registry.declares(upload.name):
            raise AdapterConflictError(f"{name} is declared in the registry file: change it there, or use another name")
        now = newest.number if newest else 0
        expect_version(upload.name, upload.expected_version, now)
        if number is not None:
            expect_older(upload.name, number, now)

    async def _check_directory(self, name: str) -> None:
        """A folder's name would mean the folder again after a restart."""
        if name not in self._registry.uploads and await self._administration.listing.in_directory(name):
            raise AdapterConflictError(f"the adapter directory has {quote(name)}: use another name")

    def _count(self) -> None:
        now = self._clock()
        passed = max(0.0, now - self._allowed_at)  # the clock may be put back
        self._allowance = min(BURST, self._allowance + passed * PER_MINUTE / 60)
        self._allowed_at = now
        if self._allowance < 1:
            raise RateLimitedError(f"at most {PER_MINUTE} uploads a minute: try again soon", 60 / PER_MINUTE)
        self._allowance -= 1

    def _give_back(self, size: int) -> None:
        self._free += size
