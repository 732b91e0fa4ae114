"""What references were resolved to. Shared by all replicas: whichever staged an adapter, the others serve the same
content.

Does not know where an adapter is.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from loraplex_router.vocabulary.references import (
    AdapterReference,
    MergedReference,
    Reference,
    Upload,
    ids_of,
    key_of,
    merged_digest,
    parts_of,
)

MAX_ENTRIES = 65536  # references remembered; clients choose them


@dataclass(frozen=True, slots=True)
class Entry:
    """What a reference was resolved to."""

    id: str  # for merged adapters, the parts' ids, separated by commas
    source: str
    revision: str
    digest: str
    known_to: frozenset[str] | None = None  # the tenants that resolved it, if that takes a token; None: everybody


class Resolutions:
    """The entries by the keys of their references, least recently used first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._keys: dict[str, dict[str, Entry]] = {}  # the same by digest, and by key

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def entry(self, reference: AdapterReference) -> Entry | None:
        """What the reference was resolved to."""
        return self._entries.get(key_of(reference))

    def digest(self, reference: Reference) -> str | None:
        """The adapter's digest, or None if unknown. A merged adapter's digest is known once its parts' digests are."""
        if isinstance(reference, MergedReference):
            parts = [digest for part in reference.adapters if (digest := self.digest(part))]
            return merged_digest(parts, reference) if len(parts) == len(reference.adapters) else None
        key = key_of(reference)
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry.digest

    def fixed(self, reference: AdapterReference) -> AdapterReference | Upload:
        """What to stage for it: with its resolved source and revision, so that another replica stages the same
        content."""
        entry, origin = self._entries.get(key_of(reference)), reference.origin
        if entry is None or isinstance(origin, Upload):
            return origin
        return replace(origin, source=entry.source, revision=entry.revision)

    def remember(self, reference: Reference, entry: Entry) -> None:
        """Those who knew a secret one before know it still."""
        key = _place(reference, entry.digest)
        former = self._drop(key)
        if former and former.id == entry.id and former.known_to and entry.known_to is not None:
            entry = replace(entry, known_to=former.known_to | entry.known_to)
        self._entries[key] = entry
        self._keys.setdefault(entry.digest, {})[key] = entry
        if len(self._entries) > MAX_ENTRIES:
            self._drop(next(iter(self._entries)))

    def is_secret(self, reference: Reference) -> bool:
        """Whether what was resolved, or a part of it, is known only to some tenants."""
        return any((entry := self.entry(part)) and entry.known_to is not None for part in parts_of(reference))

    def tell(self, reference: Reference, digest: str, tenant: str) -> None:
        """The tenant has resolved it: it knows it now, and everybody does if that took no token."""
        key = _place(reference, digest)
        entry = self._entries.get(key)
        if entry is None or entry.known_to is None or entry.id != ",".join(ids_of(reference)):
            return
        known_to = entry.known_to | {tenant} if self.is_secret(reference) else None
        self._entries[key] = self._keys[digest][key] = replace(entry, known_to=known_to)

    def of(self, digest: str) -> Collection[Entry]:
        """The entries of this content."""
        return self._keys.get(digest, {}).values()

    def names(self, digest: str) -> set[str]:
        """The ids of this content."""
        return {entry.id for entry in self.of(digest)}

    def forget(self, digest: str, id: str | None = None) -> None:
        """Has references to this content resolved anew; with `id`, only those with that id."""
        for key, entry in list(self._keys.get(digest, {}).items()):
            if id in (None, entry.id):
                self._drop(key)

    def _drop(self, key: str) -> Entry | None:
        if entry := self._entries.pop(key, None):
            del self._keys[entry.digest][key]
            if not self._keys[entry.digest]:
                del self._keys[entry.digest]
        return entry


def _place(reference: Reference, digest: str) -> str:
    """The key of its entry. A merged adapter is found through its parts; its entry only names it in listings."""
    return digest if isinstance(reference, MergedReference) else key_of(reference)
