"""What an answer must match, in the few forms that the shards compile. Knows nothing of how that is done."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from loraplex_protos.errors import FieldViolation, InvalidRequestError


class GrammarKind(Enum):
    """The values are those of shard.proto."""

    JSON_SCHEMA = 1
    REGEX = 2  # in the syntax of Rust's regex library
    LARK = 3  # as llguidance reads it, or GBNF


# Characters. The compiler follows chains of rules recursively, and rules are short in Lark: what is allowed here stays
# well within its stack.
MAX_LENGTH = {GrammarKind.JSON_SCHEMA: 32_768, GrammarKind.REGEX: 32_768, GrammarKind.LARK: 8_192}


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar as a client gave it. Only the shards know whether it can be compiled."""

    kind: GrammarKind
    text: str

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any]) -> Self:
        """What a JSON schema describes, given as its text or as an object."""
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        return cls(GrammarKind.JSON_SCHEMA, text)

    @classmethod
    def json_object(cls) -> Self:
        """Any JSON object."""
        return cls(GrammarKind.JSON_SCHEMA, '{"type": "object"}')

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Self:
        """One of these texts. Raises InvalidRequestError if there are none."""
        if not texts:
            raise InvalidRequestError(FieldViolation("grammar.choice", "give at least one text"))
        return cls(GrammarKind.LARK, "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))
