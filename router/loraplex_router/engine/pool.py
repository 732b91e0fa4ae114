"""Which adapters are staged in host memory and which hold a slot on the device. Pure bookkeeping, no transport."""

import sys
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator

from loraplex_protos.errors import AdapterPinsError, OverloadedError
from loraplex_router.vocabulary.adapter import Adapter, StagedAdapter


class AdapterPool:
    """The staged adapters and those among them that hold a slot, 1 ... slots; both least recently used first.

    Invariants: a slot belongs to at most one adapter, and all that hold one fit into the device's memory together. An
    adapter in use or pinned keeps its slot. At least one slot is left for adapters that are not pinned, and memory for
    any of those that are staged. Only adapters that nobody needs or pins are dropped from host memory, and with that
    from their slot. A slot and its memory are not reassigned before they are released.
    """

    def __init__(self, slots: int, host_bytes: int, device_bytes: int = 0) -> None:
        """`host_bytes` are over all ranks; `device_bytes` are each rank's, 0 if the slots are the only limit there."""
        self.slots = slots
        self.device_bytes = device_bytes or sys.maxsize
        self.base = Adapter("", slot=0, ready=True)
        self._host_bytes = host_bytes
        self._room = self.device_bytes  # less for a while after the device had less
        self._staged: OrderedDict[str, Adapter] = OrderedDict()
        self._sizes: list[int] = []  # on the device, of those that are staged, smallest first
        self._on_device: OrderedDict[str, Adapter] = OrderedDict()
        self._evicted: set[Adapter] = set()  # of those on the device
        self._pinned: dict[str, Adapter] = {}
        self._free_slots = list(range(slots, 0, -1))

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._staged.values())

    def __len__(self) -> int:
        return len(self._staged)

    def get(self, digest: str) -> Adapter | None:
        return self._staged.get(digest)

    def on_device(self) -> list[Adapter]:
        """The adapters that hold a slot, least recently used first."""
        return list(self._on_device.values())

    @property
    def used_bytes(self) -> int:
        """What those on the device take of each rank's memory."""
        return _size(self._on_device.values())

    @property
    def pinned(self) -> list[Adapter]:
        return list(self._pinned.values())

    @property
    def has_spare_slot(self) -> bool:
        """Whether a slot is free, or held by an adapter that nobody uses, waits for or pinned, and memory for the
        largest adapter as well."""
        kept = [adapter for adapter in self._on_device.values() if adapter.needed or adapter.pinned]
        largest = self._sizes[-1] if self._sizes else 0
        return len(kept) < self.slots and _size(kept) + largest <= self._room

    def check_room(self, staged: StagedAdapter) -> None:
        """Raises OverloadedError if the adapter is not here yet and would never fit beside the pinned ones."""
        pinned = _size(self._pinned.values())
        if staged.digest not in self._staged and pinned + staged.device_bytes > self.device_bytes:
            raise OverloadedError(
                f"the adapter needs {staged.device_bytes:,} bytes of each device, but pinned adapters leave only "
                f"{self.device_bytes - pinned:,} of {self.device_bytes:,}: unpin one, or raise adapter_memory_gib"
            )

    def add(self, digest: str, lora_rank: int, size_bytes: int, device_bytes: int = 0) -> Adapter:
        """Adds a staged adapter, or returns the one already here."""
        if digest not in self._staged:
            self._staged[digest] = Adapter(digest, lora_rank, size_bytes, device_bytes)
            insort(self._sizes, device_bytes)
        self.touch(self._staged[digest])
        return self._staged[digest]

    def touch(self, adapter: Adapter) -> None:
        """Marks it as used now."""
        if adapter is not self.base:
            self._staged.move_to_end(adapter.digest)
        if adapter.digest in self._on_device:
            self._on_device.move_to_end(adapter.digest)

    def pin(self, adapter: Adapter) -> None:
        """Pins it: it keeps its slot, or gets the next one. Raises AdapterPinsError if too little would be left."""
        pinned = [*self._pinned.values(), adapter]
        if not adapter.pinned:
            if len(pinned) >= self.slots:
                raise AdapterPinsError(f"{self.slots - 1} adapters are pinned already; unpin one first")
            largest = max((other.device_bytes for other in self if other not in pinned), default=0)
            if _size(pinned) + largest > self.device_bytes:
                raise AdapterPinsError(
                    f"pinned adapters would take {_size(pinned):,} of the {self.device_bytes:,} bytes of each device; "
                    f"another adapter needs {largest:,}: unpin one first, or raise adapter_memory_gib"
                )
        self._pinned[adapter.digest] = adapter
        adapter.pinned = True

    def unpin(self, adapter: Adapter) -> None:
        self._pinned.pop(adapter.digest, None)
        adapter.pinned = False

    def fitting(self, adapters: Iterable[Adapter]) -> list[Adapter]:
        """The first of these adapters, as many as can be on the device at once beside the pinned ones. Later ones
        overtake none, or a large one might wait forever, unless that does not fit for now."""
        room, slots = self._room, self.slots - len(self._pinned)
        for adapter in self._pinned.values():
            if adapter.device_bytes <= room:
                room -= adapter.device_bytes
        most, fitting = room, list[Adapter]()
        for adapter in adapters:
            if len(fitting) == slots or room < adapter.device_bytes <= most:
                break
            if adapter.device_bytes <= room:
                fitting.append(adapter)
                room -= adapter.device_bytes
        return fitting

    def claim_slot(self, adapter: Adapter) -> bool:
        """Gives it a slot. False: no slot is free, or not enough memory."""
        assert adapter.slot is None
        if not self._free_slots or self.used_bytes + adapter.device_bytes > self._room:
            return False
        adapter.slot = self._free_slots.pop()
        self._on_device[adapter.digest] = adapter
        return True

    def evict(self, adapters: Collection[Adapter], keep: Collection[Adapter]) -> list[Adapter]:
        """Evicts idle adapters that are not in `keep`, least recently used first, as far as `adapters` need their slots
        or memory. The caller must unload them, then release their slots."""
        evicted = []
        for idle in self.on_device():
            kept = idle.in_use or idle.pinned or idle in keep
            goes_by_itself = idle.leaving and not idle.wanted  # its slot, too
            if idle.ready and not (kept or goes_by_itself) and self.lacks(adapters):
                idle.ready = False
                self._evicted.add(idle)
                evicted.append(idle)
        return evicted

    def lacks(self, adapters: Collection[Adapter]) -> bool:
        """Whether these adapters, which hold no slots, will have too few slots or too little memory once the evicted
        ones are released."""
        return (
            len(adapters) > len(self._free_slots) + len(self._evicted)
            or self.used_bytes - _size(self._evicted) + _size(adapters) > self._room
        )

    def release_slot(self, adapter: Adapter) -> None:
        assert adapter.slot and not adapter.in_use
        self._free_slots.append(adapter.slot)
        del self._on_device[adapter.digest]
        self._evicted.discard(adapter)
        adapter.slot, adapter.ready = None, False

    def lower_room(self, adapter: Adapter) -> bool:
        """The device had no memory for this adapter beside those on it: so much will not be tried again before
        `restore_room`. Returns whether the adapter may fit once some of them have left."""
        self._room = min(self._room, self.used_bytes + adapter.device_bytes - 1)
        others = [pinned for pinned in self._pinned.values() if pinned is not adapter]
        return _size(others) + adapter.device_bytes <= self._room

    def restore_room(self) -> None:
        self._room = self.device_bytes

    def pop_over_budget(self, keep: Adapter) -> list[Adapter]:
        """Drops the least recently used adapters that nobody needs, except `keep`, until the rest fit into host memory.
        One that holds a slot is only marked as leaving: the caller must unload it, then remove it."""
        excess = sum(adapter.size_bytes for adapter in self._staged.values() if not adapter.leaving) - self._host_bytes
        dropped = []
        for adapter in list(self._staged.values()):
            if excess <= 0:
                break
            if not (adapter.needed or adapter.pinned or adapter.leaving or adapter is keep):
                excess -= adapter.size_bytes
                dropped.append(adapter)
                if adapter.slot is None:
                    self.remove(adapter)
                else:
                    adapter.leaving = True
        return dropped

    def least_needed(self) -> Adapter | None:
        """The least recently used adapter that nobody needs, with or without a slot. None: all are needed."""
        return next((a for a in self._staged.values() if not (a.needed or a.pinned or a.leaving)), None)

    def remove(self, adapter: Adapter) -> None:
        """Forgets an idle adapter. If it holds a slot, the slot stays taken until `release_slot`."""
        assert not adapter.needed
        self.unpin(adapter)
        del self._staged[adapter.digest]
        del self._sizes[bisect_left(self._sizes, adapter.device_bytes)]


def _size(adapters: Iterable[Adapter]) -> int:
    return sum(adapter.device_bytes for adapter in adapters)
