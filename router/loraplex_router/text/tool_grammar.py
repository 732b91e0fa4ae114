"""The grammar of an answer that must call tools: the form that text/tool_calls.py reads, with nothing around it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.vocabulary.grammar import EmbeddedSchema, Grammar, GrammarKind

NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
DESCRIBED = {"type", "$ref", "allOf", "anyOf", "oneOf", "enum", "const"}  # one of these says what a value may be


def read_parameters(
    parameters: Mapping[str, Any] | None, name: str, field: str, strict: bool = False
) -> EmbeddedSchema:
    """The schema of the arguments of the tool `name`: an object. Raises InvalidRequestError if it cannot be one."""
    given = {**(parameters or NO_PARAMETERS)}
    if not DESCRIBED & given.keys():
        given = {"type": "object", **given}
    kinds = given.get("type", "object")
    if kinds != "object":
        if not isinstance(kinds, list) or "object" not in kinds:
            raise InvalidRequestError(FieldViolation(field, f'of {name!r} must have the type "object"'))
        given["type"] = "object"
    return EmbeddedSchema(json.dumps(given, ensure_ascii=False), field, f"of {name!r} ", strict)


def one_call(name: str, parameters: EmbeddedSchema, field: str) -> Grammar:
    """A call of this tool."""
    return Grammar(GrammarKind.LARK, f"start: {_call(name, 0)}", (parameters,), field)


def list_of_calls(tools: Sequence[tuple[str, EmbeddedSchema]], several: bool, field: str) -> Grammar:
    """A list of one call or, if allowed, several calls of these tools."""
    start = 'start: "[" call (", " call)* "]"' if several else 'start: "[" call "]"'
    calls = [_call(name, place) for place, (name, _) in enumerate(tools)]
    rules = [f"call_{place}: {call}" for place, call in enumerate(calls)]
    choice = "call: " + " | ".join(f"call_{place}" for place in range(len(calls)))
    schemas = tuple(parameters for _, parameters in tools)
    return Grammar(GrammarKind.LARK, "\n".join([start, choice, *rules]), schemas, field)


def _call(name: str, place: int) -> str:
    beginning = f'{{"name": {json.dumps(name)}, "arguments": '
    return f'{json.dumps(beginning)} schema_{place} "}}"'
