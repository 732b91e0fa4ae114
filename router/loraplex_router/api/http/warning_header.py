"""Warnings about an answer, in a header: they are known before the answer."""

from collections.abc import Iterable
from typing import Protocol


class Answer(Protocol):
    """A generation, an embedding, scores."""

    @property
    def warnings(self) -> tuple[str, ...]: ...


def warning_header(answers: Iterable[Answer]) -> dict[str, str]:
    """Each warning once. Characters that headers may not contain are escaped."""
    found = dict.fromkeys(warning for answer in answers for warning in answer.warnings)
    text = "; ".join(found).encode("ascii", "backslashreplace").decode()
    return {"X-Loraplex-Warning": text} if text else {}
