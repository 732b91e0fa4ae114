"""examples/side_by_side.py fits the terminal's width."""

import importlib.util
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

SCRIPT = Path(__file__).parents[2] / "examples" / "side_by_side.py"


@pytest.mark.parametrize(("columns", "beside"), [(40, 1), (60, 2), (80, 2), (100, 4), (200, 4)])
def test_answers_are_shown_side_by_side_if_the_terminal_is_wide_enough(columns: int, beside: int):
    spec = importlib.util.spec_from_file_location("side_by_side", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    console = Console(width=columns, file=StringIO())
    with console.capture() as capture:
        console.print(script.render("a message", dict.fromkeys(script.ADAPTERS, "an answer"), columns))
    lines = capture.get().splitlines()
    assert {len(line) for line in lines} == {columns}
    assert max(line.count("an answer") for line in lines) == beside
    assert sum(line.count("an answer") for line in lines) == len(script.ADAPTERS)
