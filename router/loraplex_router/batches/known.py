"""Records in memory, so that lists read only those that have changed."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from pydantic import ValidationError

from loraplex_router.batches.records import BatchRecord, FileRecord

MOST_KNOWN = 10_000

R = TypeVar("R", FileRecord, BatchRecord)


class KnownRecords:
    def __init__(self) -> None:
        self._known: dict[str, tuple[str, FileRecord | BatchRecord]] = {}  # by path: version and record
        self._knowing = threading.Lock()

    def read(
        self,
        kind: type[R],
        versions: Mapping[str, str],
        find_all: Callable[[Sequence[str]], Iterable[tuple[str, bytes]]],
    ) -> list[R]:
        """The records at these paths. `find_all`: reads those that have changed; some may not be there any more."""
        with self._knowing:
            known = {path: self._known[path] for path in versions if path in self._known}
        changed = [path for path, version in versions.items() if path not in known or known[path][0] != version]
        read = dict(find_all(changed)) if changed else {}
        new = {path: (versions[path], record) for path in read if (record := parsed(read[path], kind))}
        with self._knowing:
            self._known |= new
            while len(self._known) > MOST_KNOWN:
                del self._known[next(iter(self._known))]
        return [record for _, record in (known | new).values() if isinstance(record, kind)]


def parsed(content: bytes, kind: type[R]) -> R | None:
    try:
        return kind.model_validate_json(content)
    except ValidationError:
        return None
