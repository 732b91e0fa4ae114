"""One of the engine's figures."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    wanted: float
    measured: float
    detail: str = ""
