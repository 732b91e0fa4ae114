"""Which adapters operators have pinned, and under which names. Outlives the replicas that hold them."""

from collections.abc import Iterator

from loraplex_router.vocabulary.references import AdapterReference


class Pins:
    """Content is pinned while any of its names is, or while it is by its digest, which stands for all of its names. A
    name whose content cannot be had now is pinned without a digest."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, AdapterReference | None]] = {}  # by digest and id; "" is the digest itself

    def __iter__(self) -> Iterator[tuple[str, AdapterReference]]:
        """The digests of content that is pinned under a name, each with one of these names."""
        for digest, names in list(self._names.items()):
            if digest and (reference := next(filter(None, names.values()), None)):
                yield digest, reference

    def named(self) -> list[tuple[str, AdapterReference]]:
        """All digests and names that are pinned; for a name without content, the digest is empty."""
        return [(digest, name) for digest, names in self._names.items() for name in names.values() if name]

    def add(self, digest: str, name: AdapterReference | str) -> None:
        reference = name if isinstance(name, AdapterReference) else None
        self._names.setdefault(digest, {})[reference.id if reference else ""] = reference

    def remove(self, digest: str, *ids: str) -> bool:
        """Removes the pins under these ids; without ids, all of the content's. Returns whether it has none left."""
        names = self._names.pop(digest, {})
        left = {id: name for id, name in names.items() if ids and id not in ids}
        if left:
            self._names[digest] = left
        return not left

    def has(self, digest: str, id: str) -> bool:
        """Whether the content is pinned under this id."""
        return not self._names.get(digest, {}).keys().isdisjoint((id, ""))
