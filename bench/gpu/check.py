"""A check, what it finds, and the sections that checks are grouped in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

Row = dict[str, str | int | float]
Status = Literal["PASS", "FAIL", "LATE"]  # LATE: the time was over before it began
DeviceName = Literal["cuda", "cpu"]
Kind = Literal["check", "speed", "profile"]


@dataclass(frozen=True, slots=True)
class Check:
    """`run` returns what it measured as rows of its section's table, and raises an error if something is wrong."""

    name: str
    run: Callable[[], Row | list[Row] | None]
    seconds: float = 60.0  # after which it counts as hanging


@dataclass(frozen=True, slots=True)
class Section:
    """Checks that run in one process, one after the other, and whose rows make one table."""

    name: str
    kind: Kind
    seconds: float  # its share of the whole command's time
    checks: Callable[[DeviceName], Iterator[Check]]


@dataclass(frozen=True, slots=True)
class Result:
    section: str
    check: str
    status: Status
    seconds: float
    rows: list[Row] = field(default_factory=list)
    reason: str = ""  # why it failed
