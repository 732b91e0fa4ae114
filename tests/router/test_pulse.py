"""When a replica counts as silent, and when it is given up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_router.wire.pulse import (
    COMPILE_SECONDS,
    FACTOR,
    FIRST_SECONDS,
    FIRST_STEPS,
    GRACE_SECONDS,
    IDLE_SECONDS,
    LONGEST_TICK,
    TICK_SECONDS,
    Pulse,
    Silence,
)

TOLERANCE = 2 * TICK_SECONDS


def pass_time(pulse: Pulse, seconds: float) -> Silence:
    for _ in range(round(seconds / TICK_SECONDS)):
        pulse.tick(TICK_SECONDS)
    return pulse.silence()


def step(pulse: Pulse, tokens: int, seconds: float) -> None:
    pulse.sent(tokens)
    assert not pass_time(pulse, seconds).final
    pulse.stepped()


def begun(longest_step: float = 0.5, ranks: int = 1, compiles: bool = False, steps: int = FIRST_STEPS) -> Pulse:
    """A replica that has run steps of 8 tokens, each of which took one tick."""
    pulse = Pulse(ranks, compiles, longest_step)
    pass_time(pulse, 0.5)
    pulse.begin()
    for _ in range(steps):
        step(pulse, 8, TICK_SECONDS)
    return pulse


def seconds_until_final(pulse: Pulse) -> float:
    waited = 0.0
    while not pulse.silence().final:
        pulse.tick(TICK_SECONDS)
        waited += TICK_SECONDS
    return waited


def test_an_idle_replica_whose_ranks_answer_is_never_silent() -> None:
    pulse = begun(ranks=2)
    for _ in range(100):
        pulse.pinged(0)
        pulse.pinged(1)
        assert not pass_time(pulse, TICK_SECONDS).suspicious
        pulse.answered(0)
        pulse.answered(1)
        assert not pass_time(pulse, 10).suspicious


def test_a_rank_that_does_not_answer_is_suspected_first_and_then_given_up() -> None:
    pulse = begun(ranks=2)
    for rank in (0, 1):
        pulse.pinged(rank)
    pulse.answered(0)
    assert not pass_time(pulse, GRACE_SECONDS / 2 - TOLERANCE).suspicious
    silence = pass_time(pulse, 2 * TOLERANCE)
    assert silence.suspicious and not silence.final
    assert str(silence).startswith("rank 1 has not answered for 1.")
    assert pass_time(pulse, GRACE_SECONDS / 2).final


def test_a_rank_whose_answers_take_longer_on_a_busy_machine_gets_more_time() -> None:
    pulse = begun()
    pulse.pinged(0)
    pass_time(pulse, 0.8)
    pulse.answered(0)
    pulse.pinged(0)
    assert seconds_until_final(pulse) == pytest.approx(GRACE_SECONDS + FACTOR * 0.8, abs=TOLERANCE)


def test_a_rank_that_answers_plans_is_alive_even_if_its_ping_is_lost() -> None:
    pulse = begun()
    pulse.pinged(0)
    for _ in range(100):
        step(pulse, 8, 0.5)


def test_a_rank_may_be_silent_for_long_before_the_first_step() -> None:
    pulse = Pulse(1, compiles=False, longest_step=0.5)
    pulse.pinged(0)
    assert seconds_until_final(pulse) == pytest.approx(FIRST_SECONDS, abs=TOLERANCE)


@given(seconds=st.floats(0.1, 5), steps=st.integers(FIRST_STEPS, 200))
def test_a_step_may_take_several_times_as_long_as_the_longest_recent_one(seconds: float, steps: int) -> None:
    pulse = begun(longest_step=0.1, steps=0)
    for _ in range(steps):
        pulse.sent(8)
        pass_time(pulse, seconds)
        pulse.stepped()
    pulse.sent(8)
    assert seconds_until_final(pulse) == pytest.approx(GRACE_SECONDS + FACTOR * seconds, abs=FACTOR * TOLERANCE)


def test_the_largest_step_so_far_may_take_several_times_as_long_as_the_longest_of_the_warm_up() -> None:
    pulse = begun(longest_step=20)
    pulse.sent(256)
    assert seconds_until_final(pulse) == pytest.approx(GRACE_SECONDS + FACTOR * 20, abs=TOLERANCE)


def test_only_the_first_steps_may_take_several_times_as_long_as_the_longest_of_the_warm_up() -> None:
    early, late = begun(longest_step=20, steps=FIRST_STEPS - 1), begun(longest_step=20)
    for pulse, limit in ((early, FACTOR * 20), (late, FACTOR * TICK_SECONDS)):
        pulse.sent(8)
        assert seconds_until_final(pulse) == pytest.approx(GRACE_SECONDS + limit, abs=TOLERANCE)


def test_a_step_may_take_as_long_as_larger_ones() -> None:
    pulse = begun()
    step(pulse, 256, 3)
    pulse.sent(8)
    assert seconds_until_final(pulse) == pytest.approx(GRACE_SECONDS + FACTOR * 3, abs=TOLERANCE)


def test_the_time_of_a_queued_plan_begins_when_the_previous_one_ends() -> None:
    pulse = begun()
    for _ in range(20):
        pulse.sent(8)
    for _ in range(20):
        assert not pass_time(pulse, 0.9).suspicious
        pulse.stepped()


def test_a_step_has_time_to_compile_kernels_but_a_ping_does_not() -> None:
    pulse = begun(compiles=True)
    pulse.sent(8)
    assert seconds_until_final(pulse) >= COMPILE_SECONDS
    pulse = begun(compiles=True)
    pulse.pinged(0)
    assert seconds_until_final(pulse) <= GRACE_SECONDS + 1


def test_the_first_step_after_idle_minutes_may_take_long() -> None:
    pulse = begun()
    pass_time(pulse, IDLE_SECONDS + 1)
    step(pulse, 8, 30)
    pulse.sent(8)
    assert seconds_until_final(pulse) == pytest.approx(GRACE_SECONDS + FACTOR * TICK_SECONDS, abs=TOLERANCE)


def test_time_in_which_the_router_was_suspended_does_not_count() -> None:
    pulse = begun()
    pulse.pinged(0)
    pulse.sent(8)
    pulse.tick(3600)
    assert not pulse.silence().suspicious
    assert pulse.silence().seconds == pytest.approx(LONGEST_TICK)


def test_a_long_step_is_forgotten_in_time() -> None:
    pulse = begun()
    step(pulse, 8, 2)
    for _ in range(200):
        step(pulse, 8, TICK_SECONDS)
    pulse.sent(8)
    assert seconds_until_final(pulse) < GRACE_SECONDS + 1
