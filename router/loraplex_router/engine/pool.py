"""Which adapters are staged in host memory and which hold a slot on the device. Pure bookkeeping, no transport."""

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from loraplex_router.vocabulary.adapter import BASE_NAME, Adapter


@dataclass(frozen=True, slots=True)
class SlotClaim:
    """A slot that changes hands: the adapter in it, if any, must be unloaded before the new one is loaded."""

    slot: int
    adapter: Adapter
    evicted: Adapter | None


class AdapterPool:
    """The staged adapters and those among them that hold a slot, 1 ... slots; both least recently used first.

    Invariants: a slot belongs to at most one adapter. An adapter in use or pinned keeps its slot. At least one slot is
    left for adapters that are not pinned. Only adapters that nobody needs or pins are dropped from host memory, and
    with that from their slot. A leaving adapter's slot is not reassigned before it is released.
    """

    def __init__(self, slots: int, host_bytes: int) -> None:
        self.slots = slots
        self.base = Adapter("", slot=0, ready=True, names={BASE_NAME})
        self._host_bytes = host_bytes
        self._staged: OrderedDict[str, Adapter] = OrderedDict()
        self._on_device: OrderedDict[str, Adapter] = OrderedDict()
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
    def pinned(self) -> list[Adapter]:
        return list(self._pinned.values())

    @property
    def has_spare_slot(self) -> bool:
        """Whether a slot is free, or held by an adapter that nobody uses, waits for or pinned."""
        return bool(self._free_slots) or any(not (a.needed or a.pinned) for a in self._on_device.values())

    def add(self, digest: str, lora_rank: int, size_bytes: int) -> Adapter:
        """Adds a staged adapter, or returns the one already here."""
        if digest not in self._staged:
            self._staged[digest] = Adapter(digest, lora_rank, size_bytes)
        self.touch(self._staged[digest])
        return self._staged[digest]

    def touch(self, adapter: Adapter) -> None:
        """Marks it as used now."""
        if adapter is not self.base:
            self._staged.move_to_end(adapter.digest)
        if adapter.digest in self._on_device:
            self._on_device.move_to_end(adapter.digest)

    def pin(self, adapter: Adapter) -> bool:
        """Pins it: it keeps its slot, or gets the next one. False if only one slot is not pinned."""
        if adapter.digest not in self._pinned and len(self._pinned) >= self.slots - 1:
            return False
        self._pinned[adapter.digest] = adapter
        adapter.pinned = True
        return True

    def unpin(self, adapter: Adapter) -> None:
        self._pinned.pop(adapter.digest, None)
        adapter.pinned = False

    def claim_slot(self, adapter: Adapter, keep: Collection[Adapter]) -> SlotClaim | None:
        """Claims a free slot, or the slot of the least recently used adapter that is idle and not in `keep`.

        None: every slot is in use for now.
        """
        assert adapter.slot is None
        evicted = None
        if not self._free_slots:
            idle = (a for a in self.on_device() if a.ready and not (a.in_use or a.pinned or a.leaving))
            evicted = next((a for a in idle if a not in keep), None)
            if evicted is None:
                return None
            self.release_slot(evicted)
        adapter.slot = self._free_slots.pop()
        self._on_device[adapter.digest] = adapter
        return SlotClaim(adapter.slot, adapter, evicted)

    def release_slot(self, adapter: Adapter) -> None:
        assert adapter.slot and not adapter.in_use
        self._free_slots.append(adapter.slot)
        del self._on_device[adapter.digest]
        adapter.slot, adapter.ready = None, False

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
