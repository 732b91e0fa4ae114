"""What is wrong with a request, while it is looked at."""

from collections.abc import Iterable
from itertools import islice

from loraplex_protos.errors import FieldViolation, InvalidRequestError

MAX_VIOLATIONS = 16  # told of one request


class Violations:
    """Collects what is wrong, so that a caller sees all of it at once, or the first of very much."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def check(self, right: bool, name: str, description: str) -> None:
        if not right and len(self._found) < MAX_VIOLATIONS:
            self._found.append(FieldViolation(name, description))

    def add(self, violations: Iterable[FieldViolation]) -> None:
        self._found += islice(violations, MAX_VIOLATIONS - len(self._found))

    def raise_any(self, kind: type[InvalidRequestError] = InvalidRequestError) -> None:
        """Raises InvalidRequestError, or this kind of it, if anything was wrong."""
        if self._found:
            raise kind(*self._found)
