"""What one router has at this rank: the adapters that it has had staged and loaded, and the work that it waits for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

from loraplex_protos.errors import (
    AdapterInUseError,
    AdapterInvalidError,
    AdapterNotFoundError,
    OverloadedError,
    UnavailableError,
)
from loraplex_shard.lora.once import Once
from loraplex_shard.lora.sources.protocol import Origin
from loraplex_shard.lora.stager import Caller
from loraplex_shard.lora.weights.deltas import HostAdapter
from loraplex_shard.lora.weights.transfer import Transfer
from loraplex_shard.shapes.adapter import AdapterWeights

# Has something called once the client of a call has left, or its answer is sent; False if that is already so.
OnLeave = Callable[[Callable[[], None]], bool]


class Epoch:
    """The time from one Reset to the next. Once it has ended, nothing is held any more: what was begun in it raises
    UnavailableError. May be used from any thread.

    Adapters take at most `host_bytes` together, and each of them at most `device_bytes` in a slot.
    """

    def __init__(self, transfer: Transfer, host_bytes: int, device_bytes: int) -> None:
        self.once, self.fetching = Once(), Once()
        self._transfer = transfer
        self._host_bytes = host_bytes
        self._device_bytes = device_bytes
        self._lock = Lock()  # guards all below; held only for look-ups
        self._ended = False
        self._digests: dict[Origin, str] = {}  # of adapters that have been read
        self._host: dict[str, HostAdapter] = {}  # by digest
        self._slots: dict[int, tuple[str, AdapterWeights]] = {}
        self._working: set[Caller] = set()

    def end(self) -> None:
        """Forgets all adapters, empties all slots, and ends all work."""
        with self._lock:
            self._ended = True
            self._digests.clear()
            self._host.clear()
            self._slots.clear()
            for caller in self._working:
                caller.end()

    @contextmanager
    def working(self, caller: Caller, on_leave: OnLeave) -> Iterator[None]:
        """A context in which the caller works for a client, and is ended once that one has left."""

        def end() -> None:
            with self._lock:
                if caller in self._working:
                    caller.end()

        with self._lock:
            self._check()
            self._working.add(caller)
        try:
            if not on_leave(end):
                end()
            yield
        finally:
            with self._lock:
                self._working.remove(caller)

    def get(self, digest: str) -> HostAdapter | None:
        with self._lock:
            return self._host.get(digest)

    def is_held(self, digest: str) -> bool:
        return self.get(digest) is not None

    def read_from(self, origin: Origin) -> tuple[str, HostAdapter] | None:
        """The adapter that has been read from these files, with its digest, if it is still held."""
        with self._lock:
            digest = self._digests.get(origin)
            adapter = self._host.get(digest) if digest is not None else None
        return None if digest is None or adapter is None else (digest, adapter)

    def origin_of(self, digest: str) -> Origin:
        """The files that an adapter has been read from. Raises AdapterNotFoundError."""
        with self._lock:
            origin = next((origin for origin, known in self._digests.items() if known == digest), None)
        if origin is None:
            raise AdapterNotFoundError(f"no adapter with digest {digest[:64]!r} is staged")
        return origin

    def remember(self, origin: Origin, digest: str) -> None:
        """These files have this digest."""
        with self._lock:
            self._check()
            self._digests[origin] = digest

    def hold(self, digest: str, adapter: HostAdapter) -> bool:
        """Keeps an adapter, unless it is held: returns False then, since it was read from another place at the same
        time. Raises AdapterInvalidError if it can never fit, OverloadedError if there is no room now: a process that
        exceeds its container's memory limit would be killed."""
        with self._lock:
            self._check()
            if digest in self._host:
                return False
            self._check_room(adapter.size_bytes, self._transfer.bytes_on_device(adapter.weights))
            self._host[digest] = adapter
            return True

    def drop(self, digest: str) -> HostAdapter | None:
        """Returns what was held. Raises AdapterInUseError if it is in a slot."""
        with self._lock:
            if any(occupant == digest for occupant, _ in self._slots.values()):
                raise AdapterInUseError(f"the adapter with digest {digest[:64]!r} is in a slot: unload it first")
            self._digests = {origin: known for origin, known in self._digests.items() if known != digest}
            return self._host.pop(digest, None)

    def fill(self, slot: int, digest: str, weights: AdapterWeights) -> None:
        """Raises AdapterInUseError if the slot holds another adapter."""
        with self._lock:
            self._check()
            occupant, _ = self._slots.setdefault(slot, (digest, weights))
        if occupant != digest:
            raise AdapterInUseError(f"slot {slot} holds another adapter: unload it first")

    def empty(self, slot: int) -> bool:
        """Returns whether something was in the slot."""
        with self._lock:
            return self._slots.pop(slot, None) is not None

    def in_slot(self, slot: int) -> AdapterWeights:
        """KeyError if it is empty."""
        return self._slots[slot][1]

    def count(self) -> dict[str, int]:
        """The number of adapters by tier."""
        with self._lock:
            return {"host": len(self._host), "device": len(self._slots)}

    def count_bytes(self) -> dict[str, int]:
        """What adapters take, by tier; on the CPU, slots share the host's."""
        with self._lock:
            in_slots = [self._transfer.bytes_on_device(weights) for _, weights in self._slots.values()]
            return {"host": self._held_bytes(), "device": sum(in_slots)}

    def _check(self) -> None:
        if self._ended:
            raise UnavailableError("another router has taken this replica over meanwhile")

    def _check_room(self, size: int, on_device: int) -> None:
        if size > self._host_bytes:
            raise AdapterInvalidError(
                f"the adapter takes {size:,} bytes of host memory, but all adapters together may take "
                f"{self._host_bytes:,}: give the shards more memory"
            )
        if on_device > self._device_bytes:
            raise AdapterInvalidError(
                f"the adapter takes {on_device:,} bytes of the device's memory, but all adapters in slots together may "
                f"take {self._device_bytes:,}: raise adapter_memory_gib"
            )
        free = self._host_bytes - self._held_bytes()
        if size > free:
            raise OverloadedError(
                f"the adapter needs {size:,} bytes of host memory, but only {free:,} are free: try again later"
            )

    def _held_bytes(self) -> int:
        return sum(adapter.size_bytes for adapter in self._host.values())
