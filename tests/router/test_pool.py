"""The adapter pool: no more slots than exist, one owner each, and no eviction of adapters in use."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex_router.engine.pool import AdapterPool
from loraplex_router.vocabulary.adapter import Adapter

NAMES = st.sampled_from("abcdef")
SLOTS, BUDGET = 2, 30


class Pool(RuleBasedStateMachine):
    """Adapters are staged, loaded, used and evicted in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = AdapterPool(SLOTS, BUDGET)

    def adapters(self, wanted) -> list[Adapter]:
        return [adapter for adapter in self.pool if wanted(adapter)]

    @rule(name=NAMES)
    def stage(self, name: str) -> None:
        adapter = self.pool.add(name, lora_rank=8, size_bytes=10)
        for dropped in self.pool.pop_over_budget(keep=adapter):
            assert dropped is not adapter and not dropped.needed
            assert dropped.leaving == (dropped.slot is not None) == (self.pool.get(dropped.digest) is dropped)
        assert self.pool.get(name) is adapter
        needed = self.adapters(lambda a: a.needed or a is adapter)
        assert sum(a.size_bytes for a in self.pool if not a.leaving) <= max(BUDGET, 10 * len(needed))

    @precondition(lambda self: self.adapters(lambda a: a.leaving))
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        adapter = data.draw(st.sampled_from(self.adapters(lambda a: a.leaving)))
        if not adapter.needed:
            self.pool.remove(adapter)
            self.pool.release_slot(adapter)

    @rule(name=NAMES, keep=st.sets(NAMES))
    def claim(self, name: str, keep: set[str]) -> None:
        adapter = self.pool.get(name)
        if adapter is None or adapter.slot is not None:
            return
        needed = self.adapters(lambda a: a.slot and (a.in_use or not a.ready or a.leaving or a.digest in keep))
        claim = self.pool.claim_slot(adapter, keep={a for a in self.pool if a.digest in keep})
        assert (claim is None) == (len(needed) == SLOTS)
        if claim is not None:
            assert claim.evicted not in needed

    @precondition(lambda self: self.adapters(lambda a: a.slot is not None and not a.ready))
    @rule(data=st.data(), loaded=st.booleans())
    def finish_load(self, data: st.DataObject, loaded: bool) -> None:
        adapter = data.draw(st.sampled_from(self.adapters(lambda a: a.slot is not None and not a.ready)))
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
    def a_slot_has_one_owner_and_slots_are_within_their_number(self) -> None:
        slots = [adapter.slot for adapter in self.pool.on_device()]
        assert len(slots) == len(set(slots)) <= SLOTS
        assert set(slots) <= set(range(1, SLOTS + 1))


Pool.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
test_slots_stay_within_their_number_and_what_is_needed_stays = Pool.TestCase


def test_the_least_recently_used_idle_adapter_is_evicted():
    pool = AdapterPool(slots=2, host_bytes=1000)
    first, second, third = (pool.add(name, 8, 1) for name in "abc")
    for adapter in (first, second):
        assert pool.claim_slot(adapter, keep=())
        adapter.ready = True
    pool.touch(first)
    claim = pool.claim_slot(third, keep=())
    assert claim is not None and claim.evicted is second
