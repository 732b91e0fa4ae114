import pytest

from loraplex_router.engine.pace import Pace


@pytest.fixture
def pace() -> Pace:
    """Knows that 32 tokens take 60 ms and 256 take 300, and that the shards began a plan at 100."""
    pace = Pace()
    pace.end(32, 0.06, 50.0)
    pace.end(256, 0.3, 60.0)
    pace.begin(100.0)
    return pace


def test_the_next_plan_leaves_at_once_while_nothing_is_known(pace: Pace):
    assert Pace().until_next(1, 100.0) <= 0
    assert pace.until_next(1, 100.0) <= 0


def test_the_next_plan_leaves_late_in_a_long_plan_and_milliseconds_before_the_end_of_a_short_one(pace: Pace):
    assert pace.until_next(256, 100.0) == pytest.approx(0.27)
    assert pace.until_next(256, 100.2) == pytest.approx(0.07)
    pace.end(2, 0.009, 100.0)
    assert pace.until_next(2, 100.0) == pytest.approx(0.004)


def test_a_plan_is_expected_to_take_as_long_as_the_last_one_of_about_as_many_or_less(pace: Pace):
    assert pace.until_next(39, 100.0) == pace.until_next(32, 100.0) == pytest.approx(0.054)
    pace.end(500, 0.5, 100.0)
    assert pace.until_next(460, 100.0) == pytest.approx(0.9 * 0.46)


def test_a_short_plan_that_has_just_ended_says_nothing_about_one_of_half_as_many_tokens_more(pace: Pace):
    pace.end(102, 0.5, 80.0)
    pace.end(64, 0.25, 100.0)
    assert pace.until_next(102, 100.0) == pytest.approx(0.9 * 0.5)
    assert pace.until_next(64, 100.0) == pytest.approx(0.9 * 0.25)


def test_a_plan_begins_when_the_one_before_ends_or_when_it_is_sent_to_idle_shards(pace: Pace):
    pace.end(32, 0.06, 110.0)
    assert pace.until_next(32, 110.01) == pytest.approx(0.044)
    pace.begin(200.0)
    assert pace.until_next(32, 200.01) == pytest.approx(0.044)
