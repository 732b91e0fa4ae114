"""The adapter pool: no more slots and memory than there are, one owner each, and no eviction of adapters in use."""

from contextlib import suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex_protos.errors import AdapterPinsError, OverloadedError
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.vocabulary.adapter import Adapter, StagedAdapter

NAMES = st.sampled_from("abcdef")
SLOTS, BUDGET = 3, 30
DEVICE_BYTES, SIZES = 6, {"a": 1, "b": 1, "c": 2, "d": 3, "e": 5, "f": 6}  # on the device


class Pool(RuleBasedStateMachine):
    """Adapters are staged, loaded, used and evicted in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = AdapterPool(SLOTS, BUDGET, DEVICE_BYTES)
        self.evicted: set[Adapter] = set()

    def adapters(self, wanted) -> list[Adapter]:
        return [adapter for adapter in self.pool if wanted(adapter)]

    @property
    def loading(self) -> list[Adapter]:
        return self.adapters(lambda a: a.slot is not None and not a.ready and a not in self.evicted)

    @rule(name=NAMES)
    def stage(self, name: str) -> None:
        pinned = sum(adapter.device_bytes for adapter in self.pool.pinned)
        fits = self.pool.get(name) is not None or pinned + SIZES[name] <= DEVICE_BYTES
        try:
            self.pool.check_room(StagedAdapter(name, "local", "", 8, 10, SIZES[name]))
        except OverloadedError:
            assert not fits
            return
        assert fits
        adapter = self.pool.add(name, lora_rank=8, size_bytes=10, device_bytes=SIZES[name])
        for dropped in self.pool.pop_over_budget(keep=adapter):
            assert dropped is not adapter and not dropped.needed
            assert dropped.leaving == (dropped.slot is not None) == (self.pool.get(dropped.digest) is dropped)
        assert self.pool.get(name) is adapter
        needed = self.adapters(lambda a: a.needed or a.pinned or a is adapter)
        assert sum(a.size_bytes for a in self.pool if not a.leaving) <= max(BUDGET, 10 * len(needed))

    @rule(name=NAMES)
    def pin(self, name: str) -> None:
        if adapter := self.pool.get(name):
            with suppress(AdapterPinsError):
                self.pool.pin(adapter)

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        if adapter := self.pool.get(name):
            self.pool.unpin(adapter)

    @precondition(lambda self: self.adapters(lambda a: a.leaving))
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        adapter = data.draw(st.sampled_from(self.adapters(lambda a: a.leaving)))
        if not adapter.needed:
            self.pool.remove(adapter)
            self.pool.release_slot(adapter)

    @rule(name=NAMES)
    def claim(self, name: str) -> None:
        adapter = self.pool.get(name)
        if adapter is None or adapter.slot is not None:
            return
        on_device = self.pool.on_device()
        fits = len(on_device) < SLOTS and sum(a.device_bytes for a in on_device) + SIZES[name] <= DEVICE_BYTES
        assert self.pool.claim_slot(adapter) == fits == (adapter.slot is not None)

    @rule(name=NAMES, keep=st.sets(NAMES))
    def evict(self, name: str, keep: set[str]) -> None:
        adapter = self.pool.get(name)
        if adapter is None or adapter.slot is not None:
            return
        kept = self.adapters(lambda a: a.in_use or a.pinned or not a.ready or a.leaving or a.digest in keep)
        evicted = self.pool.evict([adapter], keep={a for a in self.pool if a.digest in keep})
        assert not set(evicted).intersection(kept)
        self.evicted.update(evicted)
        idle = [a for a in self.pool.on_device() if a.ready and a not in kept]
        assert not idle or not self.pool.lacks([adapter])
        stay = [a for a in self.pool.on_device() if a not in self.evicted]
        lacks = len(stay) == SLOTS or sum(a.device_bytes for a in stay) + SIZES[name] > DEVICE_BYTES
        assert self.pool.lacks([adapter]) == lacks

    @rule(names=st.permutations("abcdef"))
    def fit(self, names: list[str]) -> None:
        found = [adapter for name in names if (adapter := self.pool.get(name)) and not adapter.pinned]
        fitting = self.pool.fitting(found)
        assert fitting == found[: len(fitting)]  # nobody is overtaken
        assert bool(fitting) == bool(found)  # so the first always gets its turn
        together = [*self.pool.pinned, *fitting]
        assert len(together) <= SLOTS and sum(a.device_bytes for a in together) <= DEVICE_BYTES

    @precondition(lambda self: self.evicted)
    @rule(data=st.data())
    def finish_eviction(self, data: st.DataObject) -> None:
        adapter = data.draw(st.sampled_from(sorted(self.evicted, key=lambda a: a.digest)))
        self.evicted.remove(adapter)
        self.pool.release_slot(adapter)

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), loaded=st.booleans())
    def finish_load(self, data: st.DataObject, loaded: bool) -> None:
        adapter = data.draw(st.sampled_from(self.loading))
        if loaded:
            adapter.ready = True
        else:
            self.pool.release_slot(adapter)

    @precondition(lambda self: self.adapters(lambda a: a.ready))
    @rule(data=st.data(), change=st.sampled_from([1, -1]))
    def run(self, data: st.DataObject, change: int) -> None:
        adapter = data.draw(st.sampled_from(self.adapters(lambda a: a.ready)))
        adapter.running = max(0, adapter.running + change)

    @rule(name=NAMES, waiting=st.integers(0, 2))
    def wait(self, name: str, waiting: int) -> None:
        if adapter := self.pool.get(name):
            adapter.waiting = waiting

    @invariant()
    def slots_and_memory_are_within_their_limits(self) -> None:
        slots = [adapter.slot for adapter in self.pool.on_device()]
        assert len(slots) == len(set(slots)) <= SLOTS
        assert set(slots) <= set(range(1, SLOTS + 1))
        assert self.pool.used_bytes == sum(adapter.device_bytes for adapter in self.pool.on_device()) <= DEVICE_BYTES

    @invariant()
    def any_staged_adapter_fits_beside_the_pinned_ones(self) -> None:
        pinned = sum(adapter.device_bytes for adapter in self.pool.pinned)
        assert len(self.pool.pinned) < SLOTS
        assert all(pinned + a.device_bytes <= DEVICE_BYTES for a in self.pool if not a.pinned)


Pool.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
test_slots_and_memory_stay_within_their_limits_and_what_is_needed_stays = Pool.TestCase


def staged(pool: AdapterPool, names: str) -> list[Adapter]:
    return [pool.add(name, 8, 1, SIZES[name]) for name in names]


def test_the_least_recently_used_idle_adapters_are_evicted_as_many_as_the_newcomer_needs():
    pool = AdapterPool(slots=3, host_bytes=1000, device_bytes=DEVICE_BYTES)
    a, b, d, c = staged(pool, "abdc")
    for adapter in (a, b, d):
        assert pool.claim_slot(adapter)
        adapter.ready = True
    pool.touch(a)
    assert not pool.claim_slot(c)
    assert pool.evict([c], keep=()) == [b]  # a slot, and with what is free enough memory
    assert pool.evict([c], keep=()) == []
    pool.release_slot(b)
    assert pool.claim_slot(c)


def test_after_the_device_had_no_memory_less_is_put_onto_it_until_that_is_forgotten():
    pool = AdapterPool(slots=3, host_bytes=1000, device_bytes=DEVICE_BYTES)
    a, c, d = staged(pool, "acd")
    assert pool.claim_slot(a) and pool.claim_slot(c)
    a.ready = c.ready = True
    assert pool.lower_room(d)
    assert not pool.claim_slot(d) and pool.evict([d], keep=()) == [a]
    pool.release_slot(a)
    assert pool.claim_slot(d)
    pool.release_slot(d)
    pool.release_slot(c)
    assert not pool.lower_room(d)  # not even alone
    assert pool.fitting([d, c]) == [c]
    pool.restore_room()
    assert pool.fitting([d, c]) == [d, c]


def test_pins_leave_memory_for_every_staged_adapter():
    pool = AdapterPool(slots=3, host_bytes=1000, device_bytes=DEVICE_BYTES)
    a, c, e = staged(pool, "ace")
    pool.pin(a)
    with pytest.raises(AdapterPinsError, match="would take 3 of the 6 bytes of each device; another adapter needs 5"):
        pool.pin(c)
    pool.remove(e)
    pool.pin(c)
