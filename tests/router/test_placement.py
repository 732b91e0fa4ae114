"""Placement: affinity within bounds, the least busy replica for cold adapters, and the same choice by all routers."""

from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from loraplex_router.replicas.placement import Candidate, choose, max_load
from loraplex_router.vocabulary.adapter import Nearness

NAMES = st.text(max_size=8)


@st.composite
def replicas(draw: st.DrawFn) -> list[Candidate]:
    names = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    loads, nearnesses = st.integers(0, 60), st.sampled_from(Nearness)
    return [Candidate(name, draw(loads), draw(st.booleans()), draw(nearnesses)) for name in names]


@given(adapter=NAMES, replicas=replicas())
def test_no_request_goes_to_a_replica_that_is_much_busier_than_another(adapter: str, replicas: list[Candidate]):
    assert choose(adapter, replicas).load <= max_load(min(replica.load for replica in replicas))


@given(adapter=NAMES, replicas=replicas())
def test_a_request_goes_to_a_replica_with_its_adapter_unless_all_of_them_are_much_busier(
    adapter: str, replicas: list[Candidate]
):
    chosen = choose(adapter, replicas)
    bound = max_load(min(replica.load for replica in replicas))
    assert all(replica.nearness <= chosen.nearness for replica in replicas if replica.load <= bound)
    homes = [replica for replica in replicas if replica.nearness is chosen.nearness and replica.load <= bound]
    if chosen.nearness is not Nearness.ABSENT:
        assert chosen.load == min(replica.load for replica in homes)


@given(adapter=NAMES, replicas=replicas())
def test_a_cold_adapter_goes_to_the_least_busy_replica_with_a_free_slot(adapter: str, replicas: list[Candidate]):
    cold = [replace(replica, nearness=Nearness.ABSENT) for replica in replicas]
    chosen = choose(adapter, cold)
    bound = max_load(min(replica.load for replica in cold))
    roomy = [replica for replica in cold if replica.load <= bound and replica.has_spare_slot]
    assert chosen.has_spare_slot == bool(roomy)
    assert chosen.load == min(replica.load for replica in roomy or cold)


@given(adapter=NAMES, replicas=replicas(), data=st.data())
def test_the_order_of_the_replicas_does_not_matter(adapter: str, replicas: list[Candidate], data: st.DataObject):
    assert choose(adapter, data.draw(st.permutations(replicas))) == choose(adapter, replicas)


@given(adapter=NAMES, names=st.lists(NAMES, min_size=2, max_size=8, unique=True), data=st.data())
def test_when_an_idle_replica_leaves_only_its_own_adapters_move(adapter: str, names: list[str], data: st.DataObject):
    idle = [Candidate(name, 0, True, Nearness.ABSENT) for name in names]
    chosen = choose(adapter, idle)
    gone = data.draw(st.sampled_from(idle))
    assume(gone is not chosen)
    assert choose(adapter, [replica for replica in idle if replica is not gone]) is chosen


def test_many_adapters_spread_over_idle_replicas():
    idle = [Candidate(f"10.0.0.{i}:50060", 0, True, Nearness.ABSENT) for i in range(4)]
    counts = [0] * 4
    for number in range(400):
        counts[idle.index(choose(f"local:adapter-{number}:", idle))] += 1
    assert min(counts) > 60
