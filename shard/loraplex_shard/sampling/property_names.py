"""JSON Schema's propertyNames in keywords that the grammar compiler knows, where that can be done."""

import re
from collections.abc import Callable
from typing import Any

from loraplex_shard.sampling.schema_references import References
from loraplex_shard.sampling.schema_tree import Schema, change_parts

DESCRIBING = {"title", "description", "default", "examples", "$comment", "$schema", "$id", "$anchor"}


def name_properties(schema: Schema) -> Schema:
    """The schema with the names of an object's further properties as their pattern. That names are strings, as programs
    say of every dictionary, goes without saying. What is left as it is, the compiler refuses."""
    references = References(schema)

    def change(node: Any) -> Any:
        return _named(node, references, change) if isinstance(node, dict) else node

    return _named(schema, references, change)


def _named(node: Schema, references: References, change: Callable[[Any], Any]) -> Schema:
    named = {key: change_parts(change, key, value) for key, value in node.items()}
    names = node.get("propertyNames")
    if isinstance(names, dict) and names.keys() - DESCRIBING == {"$ref"}:
        names = references.target(names)
    pattern = _pattern(names) if isinstance(names, dict) else None
    if pattern == "":
        del named["propertyNames"]
    elif pattern is not None and not {"properties", "patternProperties"} & node.keys():
        del named["propertyNames"]
        named["patternProperties"] = {pattern: named.get("additionalProperties", True)}
        named["additionalProperties"] = False
    return named


def _pattern(names: Schema) -> str | None:
    """What matches the names that fit; None if that is not known, empty if all do."""
    said = {key: value for key, value in names.items() if key not in DESCRIBING and (key, value) != ("type", "string")}
    match said:
        case {"pattern": str(pattern), **others} if not others:
            return pattern
        case {"const": str(name), **others} if not others:
            return f"^{re.escape(name)}$"
        case {"enum": list(choices), **others} if not others and choices:
            texts = [re.escape(name) for name in choices if isinstance(name, str)]
            return f"^({'|'.join(texts)})$" if texts else None
    return None if said else ""
