"""Adapters that administrators upload. The router keeps their files in memory and sends them to the shards of every
replica, also of one that joins later. A router that restarts has forgotten them: requests for them are refused."""

import asyncio
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

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
    """`most_bytes`: how much memory uploads may take, until the last sequence that uses them has ended."""

    def __init__(
        self,
        administration: Administration,
        replicas: Replicas,
        most_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._administration = administration
        self._registry = administration.registry
        self._replicas = replicas
        self._most = self._free = most_bytes
        self._clock = clock
        self._last = 0
        self._allowance, self._allowed_at = float(BURST), clock()

    @contextmanager
    def announced(self, upload: Announcement) -> Iterator[None]:
        """A context in which an upload arrives, and room is kept for it.

        Raises InvalidRequestError, AdapterConflictError, RateLimitedError, or OverloadedError if there is no room.
        """
        name, size = upload.name, upload.size
        if not is_name(name) or AT in name:
            raise InvalidRequestError(FieldViolation("name", f"is not valid: {RULE}; it does not contain {AT}"))
        if size > self._most:
            why = f"have {size} bytes; uploads may have {self._most} (--adapter-uploads-mib)"
            raise InvalidRequestError(FieldViolation("files", why))
        self._check(upload)
        self._count()
        if size > self._free:
            raise OverloadedError(f"the upload has {size} bytes, of which only {self._free} are free: try again later")
        self._free -= size
        try:
            yield
        except BaseException:
            self._free += size
            raise

    async def put(self, upload: Announcement, files: Mapping[str, memoryview]) -> pb.AdapterStatus:
        """Stages an announced upload on all replicas, and makes it the newest version of its name.

        Raises AdapterInvalidError if it cannot be served, AdapterConflictError if somebody else was faster.
        """
        await self._check_directory(upload.name)
        # No number is used twice, after a restart or by another router either.
        number = self._last = max(self._last + 1, int(self._clock() * 1000))
        content = Upload(files)
        version = Version(upload.name, number, content)
        reference = reference_to(version)
        try:
            first = self._replicas.choose(reference)
            await first.adapters.resolve(reference)
            others = [replica for replica in self._replicas if replica.accepting and replica is not first]
            # One where this fails now is sent it again by the first request.
            await asyncio.gather(*(other.adapters.resolve(reference) for other in others), return_exceptions=True)
            self._check(upload, number)
        except BaseException:
            self._administration.retire(reference)
            raise
        former = self._registry.uploads.get(upload.name)
        self._registry.uploads[upload.name] = version
        weakref.finalize(content, self._give_back, upload.size)
        if former is not None:
            self._administration.retire(reference_to(former))
        return self._administration.status(reference)

    def remove(self, name: str, expected_version: int | None) -> None:
        """Removes an uploaded name. Raises AdapterNotFoundError, or AdapterConflictError if it is not as expected."""
        self._check(Announcement(name, 0, expected_version))
        version = self._registry.uploads.pop(name, None)
        if version is None:
            raise AdapterNotFoundError(f"no adapter {quote(name)} has been uploaded")
        self._administration.retire(reference_to(version))

    def _check(self, upload: Announcement, number: int | None = None) -> None:
        """Checks the name as it is now. `number`: the version that would be its newest one."""
        name, now = quote(upload.name), self._registry.uploads.get(upload.name)
        if self._registry.declares(upload.name):
            raise AdapterConflictError(f"{name} is declared in the registry file: change it there, or use another name")
        there = now.number if now else 0
        if upload.expected_version not in (None, there) or (number is not None and there > number):
            state = f"has version {there} now" if now else "is not registered"
            raise AdapterConflictError(f"{name} {state}: somebody else has changed it")

    async def _check_directory(self, name: str) -> None:
        """A folder's name would mean the folder again after a restart."""
        if name not in self._registry.uploads and await self._administration.in_directory(name):
            raise AdapterConflictError(f"the adapter directory has {quote(name)}: use another name")

    def _count(self) -> None:
        now = self._clock()
        self._allowance = min(BURST, self._allowance + (now - self._allowed_at) * PER_MINUTE / 60)
        self._allowed_at = now
        if self._allowance < 1:
            raise RateLimitedError(f"at most {PER_MINUTE} uploads a minute: try again soon", 60 / PER_MINUTE)
        self._allowance -= 1

    def _give_back(self, size: int) -> None:
        self._free += size
