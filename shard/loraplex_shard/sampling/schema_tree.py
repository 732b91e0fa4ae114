"""JSON schemas as trees: the schemas in a schema."""

from collections.abc import Callable, Iterator
from typing import Any

MAPS = {"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"}  # of schemas
VALUES = {"const", "enum", "default", "examples"}  # documents, not schemas

Schema = dict[str, Any]


def change_parts(change: Callable[[Any], Any], key: str, value: Any) -> Any:
    """What a schema says with a keyword, with a change made to each schema in it. Under a keyword that is not known
    there may be some as well: references can lead there."""
    if key in VALUES:
        return value
    if key in MAPS and isinstance(value, dict):
        return {name: change(part) for name, part in value.items()}
    return [change(part) for part in value] if isinstance(value, list) else change(value)


def parts(node: Schema) -> Iterator[Schema]:
    """The schemas right inside a schema."""
    found = list[Any]()
    for key, value in node.items():
        change_parts(found.append, key, value)
    return (part for part in found if isinstance(part, dict))


def nodes(schema: Any) -> Iterator[Schema]:
    """A schema and all schemas in it."""
    if isinstance(schema, dict):
        yield schema
        for part in parts(schema):
            yield from nodes(part)
