"""When the ranks are restarted after one has ended."""

from hypothesis import given
from hypothesis import strategies as st

from loraplex.cli.ranks import describe_end
from loraplex.cli.restarts import MAX_DELAY, MAX_FAILED_STARTS, STEADY_SECONDS, Restarts


def test_a_replica_that_never_served_is_not_restarted() -> None:
    restarts = Restarts()
    assert restarts.delay(None) is None
    assert restarts.reason == "before the replica was ready"


@given(st.lists(st.floats(0, 1000), max_size=50))
def test_a_replica_that_becomes_ready_again_each_time_is_never_given_up(served: list[float]) -> None:
    restarts = Restarts()
    delays = [restarts.delay(seconds) for seconds in served]
    assert all(delay is not None and 0 <= delay <= MAX_DELAY for delay in delays)


def test_failed_starts_in_a_row_are_counted_since_the_last_service() -> None:
    restarts = Restarts()
    restarts.delay(1.0)
    for _ in range(MAX_FAILED_STARTS - 1):
        assert restarts.delay(None) is not None
    assert restarts.delay(0.0) is not None
    assert [restarts.delay(None) is None for _ in range(MAX_FAILED_STARTS)] == [False] * 4 + [True]
    assert restarts.reason == "and 5 restarts have failed"


def test_the_first_restart_is_immediate_and_later_ones_wait_until_service_is_steady() -> None:
    restarts = Restarts()
    assert [restarts.delay(1.0) for _ in range(8)] == [0, 0.25, 0.5, 1, 2, 4, 5, 5]
    assert restarts.delay(STEADY_SECONDS) == 0


def test_the_end_of_a_process_is_described_in_words() -> None:
    assert describe_end(1) == "ended with status 1"
    assert describe_end(-11) == "was killed by SIGSEGV"
    assert describe_end(-9) == "was killed by SIGKILL (out of memory?)"
