"""Collecting the faults of a request while it is checked."""

from collections.abc import Iterable
from itertools import islice

from loraplex_protos.errors import FieldViolation, InvalidRequestError

MAX_VIOLATIONS = 16  # reported per request


class Violations:
    """Collects violations, so that a caller sees all of them at once, or the first MAX_VIOLATIONS."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def check(self, right: bool, name: str, description: str) -> None:
        if not right and len(self._found) < MAX_VIOLATIONS:
            self._found.append(FieldViolation(name, description))

    def add(self, violations: Iterable[FieldViolation]) -> None:
        self._found += islice(violations, MAX_VIOLATIONS - len(self._found))

    def raise_any(self, kind: type[InvalidRequestError] = InvalidRequestError) -> None:
        """Raises an error of this kind if there are any violations."""
        if self._found:
            raise kind(*self._found)
