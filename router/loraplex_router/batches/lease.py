"""Which router runs the batches of a bucket: the one whose name is in an object, which it writes again every few
seconds.

No clock is compared with another one. A holder stops believing in its lease HELD_SECONDS after it began to write it the
last time; another router takes the lease STALE_SECONDS after it first saw what is still there. A router that stood
still in between may write late; what it writes is harmless for other reasons (`bucket_job.py`).
"""

import logging
import secrets
import threading
from time import monotonic
from typing import TYPE_CHECKING

from loraplex_protos.errors import UnavailableError
from loraplex_router.batches.objects import ConflictError, Found, Objects

if TYPE_CHECKING:
    from obstore import UpdateVersion

logger = logging.getLogger(__name__)

UNKNOWN: "UpdateVersion" = {"e_tag": '"0"', "version": "1"}  # which no object has
RENEW_SECONDS, HELD_SECONDS, STALE_SECONDS = 2.0, 8.0, 10.0


class Lease:
    """Blocks, but for `held`."""

    def __init__(self, objects: Objects, path: str) -> None:
        self._objects = objects
        self._path = path
        self._owner = secrets.token_hex(8).encode()
        self._held_until = 0.0
        self._version: UpdateVersion | None = None
        self._count = 0
        self._seen: tuple[UpdateVersion, float] | None = None  # another's lease, and since when
        self._released = threading.Event()
        self._renewing: threading.Thread | None = None
        self._conditional = False  # whether the store is known to honour conditions

    @property
    def held(self) -> bool:
        return monotonic() < self._held_until

    def take(self) -> bool:
        """Takes it if nobody has it, and keeps it until `release` or until the store does not answer in time. Raises
        UnavailableError."""
        if self.held:
            return True
        if self._renewing and self._renewing.is_alive():
            return False
        self._check_conditions()
        found = self._objects.find(self._path)
        if found is not None and _owner(found) not in (b"", self._owner):
            if self._seen is None or self._seen[0] != found.version:
                self._seen = found.version, monotonic()
            if monotonic() < self._seen[1] + STALE_SECONDS:
                return False
        self._version = found.version if found else None
        if not self._write():
            return False
        self._released.clear()
        self._renewing = threading.Thread(target=self._renew, name="lease of batches", daemon=True)
        self._renewing.start()
        return True

    def release(self) -> None:
        """Lets another router take it at once, if the store answers."""
        self._released.set()
        if self._renewing:
            self._renewing.join()
        if self.held:  # else the store fails, or another router has it
            self._held_until = 0.0
            try:
                self._objects.replace(self._path, b"", self._version)
            except (ConflictError, UnavailableError) as error:
                logger.warning("the lease of batches is not given back, and ends by itself: %s", error)

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS) and self.held:
            try:
                if not self._write():
                    break
            except UnavailableError as error:
                logger.warning("the lease of batches cannot be renewed: %s", error)
        if not self._released.is_set():
            self._held_until = 0.0
            logger.warning("the lease of batches is lost: another router may take it")

    def _write(self) -> bool:
        """Whether it is ours."""
        for _ in range(2):
            began = monotonic()
            self._count += 1
            content = b"%b %d" % (self._owner, self._count)
            try:
                self._version = self._objects.replace(self._path, content, self._version)
            except ConflictError:
                found = self._objects.find(self._path)
                if found is None or _owner(found) != self._owner:
                    break
                self._version = found.version  # an earlier write of ours, which was not answered
            else:
                self._held_until = began + HELD_SECONDS
                return True
        return False

    def _check_conditions(self) -> None:
        """Some stores ignore them, and two routers would both hold the lease."""
        if self._conditional:
            return
        path = f"{self._path}-{secrets.token_hex(8)}"
        self._objects.put(path, b"")
        ignored = self._replaces(path, None) or self._replaces(path, UNKNOWN)
        self._objects.delete([path])
        if ignored:
            why = "it ignores conditions (If-Match, If-None-Match): use another store"
            raise UnavailableError(f"the bucket of batches cannot be used: {why}")
        self._conditional = True

    def _replaces(self, path: str, version: "UpdateVersion | None") -> bool:
        try:
            self._objects.replace(path, b"", version)
        except ConflictError:
            return False
        return True


def _owner(found: Found) -> bytes:
    """Empty for a lease that was given back."""
    return found.content.partition(b" ")[0]
