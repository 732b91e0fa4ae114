"""Random JSON schemas. Nearly all of their documents are short."""

from random import Random

TAG = {"type": "string", "pattern": "^#[a-z]{1,5}$"}


def random_document_schema(random: Random) -> dict[str, object]:
    """A complete schema, with the definition that its parts refer to."""
    return {**random_schema(random), "$defs": {"tag": TAG}}


def random_schema(random: Random, depth: int = 0) -> dict[str, object]:
    """Nested objects and arrays, enums, patterns, unicode keys, references."""
    leaves: list[dict[str, object]] = [
        {"type": "integer", "minimum": -5, "maximum": random.randrange(10, 10**6)},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": random.randrange(1, 9)},
        {"type": "string", "pattern": r"^[A-Z]{2}-\d{1,4}$"},
        {"enum": ["red", "grün", 7, None, [1, {"a": "b"}]]},
        {"const": {"κλειδί": [True]}},
        {"$ref": "#/$defs/tag"},
    ]
    if depth == 3 or random.random() < 0.3:
        return random.choice(leaves)
    match random.randrange(3):
        case 0:
            return {"type": "array", "items": random_schema(random, depth + 1), "maxItems": random.randrange(1, 4)}
        case 1:
            return {"anyOf": [random_schema(random, depth + 1), {"type": "string", "maxLength": 3}]}
        case _:
            names = random.sample(["id", "größe", "名前", "a b", 'quo"te', "😀"], random.randrange(1, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(random, depth + 1) for name in names},
                "required": [name for name in names if random.random() < 0.6],
                "additionalProperties": False,
            }


def random_tool_schema(random: Random) -> dict[str, object]:
    """An object's schema as programs write them for tools. It refers to its parts and to itself, by names that have
    other meanings in other tools' schemas."""
    home = random.choice(["$defs", "definitions"])
    words, items = random.sample(["Item", "größe 1", "a/b", "List[Item]", "m~n"], 2)
    pointer = {name: f"#/{home}/{name.replace('~', '~0').replace('/', '~1')}" for name in (words, items)}
    parts = {
        words: {"enum": random.sample(["red", "grün", "1", "名前", "/", "~"], 2)},
        items: {"type": "array", "items": {"$ref": pointer[words]}, "maxItems": 2},
    }
    properties: dict[str, object] = {
        "word": {"$ref": pointer[words]},
        "again": {"anyOf": [{"$ref": "#/properties/word"}, {"type": "null"}]},
        "items": {"$ref": pointer[items], "description": "with a sibling"},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
        "other": random_schema(random, 2),
    }
    required = [name for name in properties if random.random() < 0.6]
    definitions = (
        {"definitions": parts, "$defs": {"tag": TAG}} if home == "definitions" else {"$defs": {"tag": TAG, **parts}}
    )
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        **definitions,
    }
