"""Grammars that an answer must match. A grammar that the server cannot compile is an `InvalidRequestError`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from loraplex_protos import generation_pb2 as pb


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """A document that is valid against the schema."""

    schema: str | Mapping[str, object]
    """JSON text, or the parsed value."""


@dataclass(frozen=True, slots=True)
class JsonObject:
    """Any JSON object."""


@dataclass(frozen=True, slots=True)
class Regex:
    """A match of the whole expression, in the syntax of Rust's regex library: without look-around or
    back-references."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One of these texts."""

    texts: Sequence[str]


@dataclass(frozen=True, slots=True)
class Lark:
    """A sentence of a context-free grammar, in llguidance's variant of Lark or in GBNF."""

    text: str


Grammar: TypeAlias = JsonSchema | JsonObject | Regex | Choice | Lark


def to_proto(grammar: Grammar) -> pb.Grammar:
    """Raises TypeError or ValueError if a value does not fit the message."""
    match grammar:
        case JsonSchema(schema):
            return pb.Grammar(json_schema=schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False))
        case JsonObject():
            return pb.Grammar(json_object=pb.JsonObject())
        case Regex(pattern):
            return pb.Grammar(regex=pattern)
        case Choice(texts):
            return pb.Grammar(choice=pb.Choice(texts=texts))
        case Lark(text):
            return pb.Grammar(lark=text)
