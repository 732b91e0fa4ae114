"""JSON Schema's propertyNames in keywords that the grammar compiler knows, where that can be done."""

import json
from typing import Any

from loraplex_shard.sampling.schema_references import References
from loraplex_shard.sampling.schema_tree import Schema, change_parts

DESCRIBING = {"title", "description", "default", "examples", "$comment", "$schema", "$id", "$anchor"}
MOST_CHARACTERS = 32_768  # of the schemas of one object's listed names


def name_properties(schema: Schema) -> Schema:
    """The schema with the names of an object's further properties listed, or as their pattern. That names are strings,
    as programs say of every dictionary, goes without saying. What is left as it is, the compiler refuses."""
    references = References(schema)

    def change(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        changed = {key: change_parts(change, key, value) for key, value in node.items()}
        names = node.get("propertyNames")
        if isinstance(names, dict) and names.keys() - DESCRIBING == {"$ref"}:
            names = references.target(names)
        if not isinstance(names, dict):
            return changed
        found = _properties(names, changed.get("additionalProperties", True))
        if found is None or (found and {"properties", "patternProperties"} & node.keys()):
            return changed
        del changed["propertyNames"]
        return {**changed, **found}

    return {**change(schema)}


def _properties(names: Schema, value: Any) -> Schema | None:
    """The properties whose names fit, each with this schema; None if they are not known, empty if all names do."""
    said = {key: part for key, part in names.items() if key not in DESCRIBING and (key, part) != ("type", "string")}
    listed = [said["const"]] if "const" in said else said.get("enum")
    if not said:
        return {}
    if len(said) > 1:
        return None
    if isinstance(pattern := said.get("pattern"), str):
        return {"patternProperties": {pattern: value}, "additionalProperties": False}
    texts = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    if not texts or len(texts) * len(json.dumps(value)) > MOST_CHARACTERS:
        return None
    return {"properties": dict.fromkeys(texts, value), "additionalProperties": False}
