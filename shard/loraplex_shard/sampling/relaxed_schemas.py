"""JSON schemas without what the grammar compiler cannot enforce. What fits the schema fits the relaxed one."""

from collections.abc import Callable
from functools import cache
from typing import Any

from loraplex_shard.sampling.schema_tree import Schema, change_parts

# Each of these only narrows what fits.
NARROWING = {
    *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "propertyNames"),
    *("unevaluatedProperties", "unevaluatedItems", "uniqueItems", "contains", "minContains", "maxContains"),
}
# With these values they narrow nothing.
VACUOUS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("uniqueItems", "not"), (False,)),
    **dict.fromkeys(("unevaluatedProperties", "unevaluatedItems", "propertyNames", "contains"), (True, {})),
    **dict.fromkeys(("dependentRequired", "dependentSchemas", "dependencies"), ({},)),
    "minContains": (0,),
}
EVERYTHING: tuple[Any, ...] = (True, {})
NOTHING = {"enum": list[Any]()}


def relax(schema: Schema, compiles: Callable[[str], bool]) -> tuple[Schema, list[str]]:
    """The relaxed schema, and the keywords that are left out, each once. `compiles`: whether an expression can be
    compiled."""
    left_out = dict[str, None]()
    compiles = cache(compiles)

    def change(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if node.get("not") in EVERYTHING:
            return NOTHING
        kept = Schema()
        for key, value in node.items():
            if key in NARROWING or (key == "pattern" and isinstance(value, str) and not compiles(value)):
                if value not in VACUOUS.get(key, ()):
                    left_out[key] = None
            else:
                kept[key] = change_parts(change, key, value)
        patterns = kept.get("patternProperties")
        if isinstance(patterns, dict) and not all(map(compiles, patterns)):
            left_out["patternProperties"] = None
            kept |= _without(patterns, compiles, kept.get("additionalProperties", True))
        return kept

    return {**change(schema)}, list(left_out)


def _without(patterns: Schema, compiles: Callable[[str], bool], others: Any) -> Schema:
    """The patterns that compile. What the rest describe may be in any property: its name is not known to fit."""
    described = [value for pattern, value in patterns.items() if not compiles(pattern)]
    kept = {pattern: value for pattern, value in patterns.items() if compiles(pattern)}
    allowed = [*described, *([] if others is False else [others])]
    return {"patternProperties": kept, "additionalProperties": allowed[0] if len(allowed) == 1 else {"anyOf": allowed}}
