"""Placement: affinity within bounds, the least busy group for the cold, and the same choice by every router."""

from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from loraplex_router.placement import Candidate, Residence, choose, most_load

NAMES = st.text(max_size=8)


@st.composite
def groups(draw: st.DrawFn) -> list[Candidate]:
    names = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    loads, residences = st.integers(0, 60), st.sampled_from(Residence)
    return [Candidate(name, draw(loads), draw(st.booleans()), draw(residences)) for name in names]


@given(adapter=NAMES, groups=groups())
def test_nobody_is_sent_to_a_group_that_is_much_busier_than_another(adapter: str, groups: list[Candidate]):
    assert choose(adapter, groups).load <= most_load(min(group.load for group in groups))


@given(adapter=NAMES, groups=groups())
def test_an_adapter_goes_where_it_is_unless_everybody_who_has_it_is_much_busier(adapter: str, groups: list[Candidate]):
    chosen = choose(adapter, groups)
    bound = most_load(min(group.load for group in groups))
    assert all(group.residence <= chosen.residence for group in groups if group.load <= bound)
    homes = [group for group in groups if group.residence is chosen.residence and group.load <= bound]
    if chosen.residence is not Residence.ABSENT:
        assert chosen.load == min(group.load for group in homes)


@given(adapter=NAMES, groups=groups())
def test_a_cold_adapter_goes_to_the_least_busy_group_with_a_slot_to_spare(adapter: str, groups: list[Candidate]):
    cold = [replace(group, residence=Residence.ABSENT) for group in groups]
    chosen = choose(adapter, cold)
    bound = most_load(min(group.load for group in cold))
    roomy = [group for group in cold if group.load <= bound and group.has_spare_slot]
    assert chosen.has_spare_slot == bool(roomy)
    assert chosen.load == min(group.load for group in roomy or cold)


@given(adapter=NAMES, groups=groups(), data=st.data())
def test_the_order_in_which_groups_are_known_does_not_matter(
    adapter: str, groups: list[Candidate], data: st.DataObject
):
    assert choose(adapter, data.draw(st.permutations(groups))) == choose(adapter, groups)


@given(adapter=NAMES, names=st.lists(NAMES, min_size=2, max_size=8, unique=True), data=st.data())
def test_among_idle_groups_one_that_goes_moves_no_adapter_but_its_own(
    adapter: str, names: list[str], data: st.DataObject
):
    idle = [Candidate(name, 0, True, Residence.ABSENT) for name in names]
    chosen = choose(adapter, idle)
    gone = data.draw(st.sampled_from(idle))
    assume(gone is not chosen)
    assert choose(adapter, [group for group in idle if group is not gone]) is chosen


def test_many_adapters_spread_over_idle_groups():
    idle = [Candidate(f"10.0.0.{i}:50060", 0, True, Residence.ABSENT) for i in range(4)]
    counts = [0] * 4
    for number in range(400):
        counts[idle.index(choose(f"local:adapter-{number}:", idle))] += 1
    assert min(counts) > 60
