"""`loraplex top`: the numbers of a frame follow from two scrapes."""

import pytest

from loraplex.cli.samples import Change, Samples
from loraplex.cli.top import frame
from tests.client.scrapes import BEFORE, NOW


def shown(before: str, now: str, columns: int = 200, seconds: float = 2.0) -> str:
    return frame(Change(Samples(0.0, before), Samples(seconds, now)), columns)


def test_a_frame_shows_queues_rates_and_means():
    text = shown(BEFORE, NOW)
    assert "org/model" in text
    assert "running 3   waiting 2   requests/s 3.0   not finished/s 1.0   tokens/s 100.0   first token 200.0 ms" in text
    replica = next(line.split() for line in text.splitlines() if line.startswith("0 "))
    assert replica[1:3] == ["3", "2"] and "25%" in replica
    assert replica[-7:] == ["9", "25.0", "20.0", "ms", "8.0", "3.0", "-"] and "4/64" in replica
    adapter = next(line.split() for line in text.splitlines() if line.startswith("sql"))
    assert adapter == ["sql", "3", "0", "3.0", "0.0", "40.0", "25.0", "ms"]


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_a_frame_fits_and_cuts_nothing(columns: int):
    name = "unix:/tmp/loraplex-1234/rank0.sock"
    text = shown(BEFORE, NOW.replace('replica="0"', f'replica="{name}"'), columns)
    lines = text.splitlines()
    assert max(map(len, lines)) <= columns and "…" not in text
    assert any(line.startswith(name) for line in lines)
    for pair in ("running 3", "first token 200.0 ms", "KV cache ██████▒▒▒▒▒▒░░░░░░░░░░░░ 25%", "step 20.0 ms"):
        assert columns == 200 or any(pair in line for line in lines)


def test_a_bar_is_ascii_if_the_terminal_supports_nothing_else():
    change = Change(Samples(0.0, BEFORE), Samples(2.0, NOW))
    assert "######======............ 25%" in frame(change, 80, ascii_only=True)


def test_an_adapters_name_is_shown_as_it_is():
    assert "[red]x" in shown(BEFORE, NOW)


def test_a_server_that_has_done_nothing_yet_has_a_frame():
    assert "requests/s 0.0" in shown("", "")


def test_several_routers_are_summed():
    both = Samples(0.0, NOW, NOW)
    assert both.sum("loraplex_sequences", state="running") == 6


def test_a_counter_that_was_reset_has_no_negative_rate():
    change = Change(Samples(0.0, "c_total 10"), Samples(1.0, "c_total 3"))
    assert change.rate("c_total") == 0


def test_labels_are_unescaped():
    (sample,) = Samples(0.0, r'm{a="x\"y\\z\n,{}",b="2"} 1').find("m")
    assert sample.labels == {"a": 'x"y\\z\n,{}', "b": "2"}


@pytest.mark.parametrize("text", ["<html>", "name{a} x y z"])
def test_what_is_not_prometheus_is_refused(text: str):
    with pytest.raises(ValueError, match="text format"):
        Samples(0.0, text)
