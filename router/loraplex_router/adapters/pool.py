"""Which adapters are staged in host memory and which hold a slot on the device. Pure bookkeeping, no transport."""

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Adapter:
    """One adapter, by content. The base model is the adapter with the empty digest, always ready in slot 0."""

    digest: str
    lora_rank: int = 0
    size_bytes: int = 0
    chat_template: str = ""  # its own; empty: the model's
    slot: int | None = None  # held from the start of its load to its eviction
    ready: bool = False  # every rank has it in its slot
    waiting: int = 0  # sequences in its queue
    running: int = 0  # sequences that hold a row
    plans: int = 0  # plans in flight that name its slot
    merges: int = 0  # merges under way that it is a part of; they need it staged
    turn: int = 0  # sequences it may still start before older ones of adapters without a slot; see the scheduler
    name: str = ""  # the id under which it was staged last
    loaded: float = 0.0  # when its slot was filled last, on the clock of time.monotonic

    @property
    def in_use(self) -> bool:
        return bool(self.running or self.plans)


@dataclass(frozen=True, slots=True)
class SlotClaim:
    """A slot changes hands: the adapter in it, if any, must be unloaded before the new one is loaded."""

    slot: int
    adapter: Adapter
    evicted: Adapter | None


class AdapterPool:
    """The staged adapters, least recently used first, and the slots 1 ... slots.

    Invariants: a slot belongs to one adapter at most; an adapter in use keeps its slot; only what nobody waits for,
    merges, runs or holds on the device is dropped from host memory.
    """

    def __init__(self, slots: int, host_bytes: int) -> None:
        self.slots = slots
        self.base = Adapter("", slot=0, ready=True, name="base")
        self._host_bytes = host_bytes
        self._staged: OrderedDict[str, Adapter] = OrderedDict()
        self._free_slots = list(range(slots, 0, -1))

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._staged.values())

    def get(self, digest: str) -> Adapter | None:
        return self._staged.get(digest)

    def on_device(self) -> list[Adapter]:
        """Those that hold a slot, least recently used first."""
        return [adapter for adapter in self._staged.values() if adapter.slot is not None]

    def add(self, digest: str, lora_rank: int, size_bytes: int) -> Adapter:
        """A newly staged adapter, or the one that is here already."""
        if digest not in self._staged:
            self._staged[digest] = Adapter(digest, lora_rank, size_bytes)
        self.touch(self._staged[digest])
        return self._staged[digest]

    def touch(self, adapter: Adapter) -> None:
        """Marks it as used now."""
        if adapter is not self.base:
            self._staged.move_to_end(adapter.digest)

    def claim_slot(self, adapter: Adapter, keep: Collection[Adapter]) -> SlotClaim | None:
        """Gives it a free slot, or that of the least recently used adapter that is idle and not in `keep`.

        None: every slot is in use for now.
        """
        assert adapter.slot is None
        evicted = None
        if not self._free_slots:
            idle = (a for a in self.on_device() if a.ready and not a.in_use and a not in keep)
            evicted = next(idle, None)
            if evicted is None:
                return None
            self.release_slot(evicted)
        adapter.slot = self._free_slots.pop()
        return SlotClaim(adapter.slot, adapter, evicted)

    def release_slot(self, adapter: Adapter) -> None:
        assert adapter.slot and not adapter.in_use
        self._free_slots.append(adapter.slot)
        adapter.slot, adapter.ready = None, False

    def pop_over_budget(self, keep: Adapter) -> list[Adapter]:
        """Drops the least recently used adapters that nobody needs, `keep` excepted, until the rest fit into host
        memory."""
        excess = sum(adapter.size_bytes for adapter in self._staged.values()) - self._host_bytes
        dropped = []
        for adapter in list(self._staged.values()):
            if excess <= 0:
                break
            if adapter.slot is None and not adapter.waiting and not adapter.merges and adapter is not keep:
                excess -= adapter.size_bytes
                dropped.append(adapter)
                self.remove(adapter)
        return dropped

    def remove(self, adapter: Adapter) -> None:
        """Forgets an idle adapter. If it holds a slot, the slot stays taken until `release_slot`."""
        assert not adapter.waiting and not adapter.merges and not adapter.in_use
        del self._staged[adapter.digest]
