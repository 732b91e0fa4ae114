"""Finds the references in a JSON schema that no document could ever satisfy, because they lead back to themselves.

A list's `next` may refer to the list where it may be absent or null as well. If it must be there, no document is
deep enough, and a model that follows the schema does not come to an end.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from loraplex_shard.sampling.schema_references import References
from loraplex_shard.sampling.schema_tree import Schema


def endless_references(schema: Schema) -> set[int]:
    """The id() of each schema in this one whose $ref leads to itself without end; of the whole schema, too, if no
    document fits it."""
    references = _Needs(schema)
    needed_by = defaultdict[int, list[Schema]](list)
    for node in references.nodes:
        for part in references.needed(node):
            needed_by[id(part)].append(node)
    ending, undecided = set[int](), list(references.nodes)
    while undecided:
        node = undecided.pop()
        if id(node) not in ending and references.ends(node, ending):
            ending.add(id(node))
            undecided += needed_by[id(node)]
    targets = {id(node): references.target(node) for node in references.nodes if "$ref" in node}
    endless = {node for node, target in targets.items() if target is not None and id(target) not in ending}
    return endless | ({id(schema)} - ending)


class _Needs(References):
    """What a document needs in order to fit."""

    def needed(self, node: Schema) -> Iterator[Schema]:
        """What a document that fits may have to fit, or have in it."""
        for choices in self._needs(node):
            yield from (choice for choice in choices if isinstance(choice, dict))

    def ends(self, node: Schema, ending: set[int]) -> bool:
        """Whether some document fits, as far as it is known of others that one does."""
        return all(
            any(not isinstance(choice, dict) or id(choice) in ending for choice in choices)
            for choices in self._needs(node)
        )

    def _needs(self, node: Schema) -> Iterator[Iterable[Any]]:
        """Of each of these, one has to end."""
        if "$ref" in node:
            yield [self.target(node)]
        for part in _listed(node, "allOf"):
            yield [part]
        for key in ("anyOf", "oneOf"):
            if choices := _listed(node, key):
                yield choices
        if node.get("type") == "object" and isinstance(node.get("properties"), dict):
            for name in _listed(node, "required"):
                yield [node["properties"].get(name) if isinstance(name, str) else None]
        if node.get("type") == "array" and isinstance(least := node.get("minItems"), int):
            tuple_form = "prefixItems" if "prefixItems" in node else "items"
            first = _listed(node, tuple_form)[:least]
            for part in first:
                yield [part]
            if len(first) < least:
                yield [node.get("items")]


def _listed(node: Schema, key: str) -> list[Any]:
    value = node.get(key)
    return value if isinstance(value, list) else []
