"""Collecting the faults of a request while it is checked."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

from loraplex_protos.errors import AdapterError, FieldViolation, ForbiddenError, InvalidRequestError

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


@contextmanager
def naming(field: str) -> Iterator[None]:
    """A context in which the request's field with this name is the adapter: errors about it name the field."""
    try:
        yield
    except InvalidRequestError as error:
        raise type(error)(
            *(FieldViolation(_within(each.field, field), each.description) for each in error.violations)
        ) from error
    except (AdapterError, ForbiddenError) as error:
        error.field = _within(error.field, field)
        raise


def _within(name: str, field: str) -> str:
    first, dot, rest = name.partition(".")
    return f"{field}.{rest}" if dot and first == "adapter" else name
