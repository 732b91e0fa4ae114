"""What an answer must match, in the few forms that the shards compile."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.vocabulary.thoughts import Thoughts


class GrammarKind(Enum):
    """The values are those of shard.proto."""

    JSON_SCHEMA = 1
    REGEX = 2  # in the syntax of Rust's regex library
    LARK = 3  # as llguidance reads it, or GBNF


MAX_SCHEMAS_LENGTH = 262_144  # characters of all of a grammar's schemas

# Characters. The compiler follows chains of rules recursively, and rules are short in Lark: what is allowed here stays
# well within its stack.
MAX_LENGTH = {GrammarKind.JSON_SCHEMA: 32_768, GrammarKind.REGEX: 32_768, GrammarKind.LARK: 8_192}


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar as a client gave it. Only the shards know whether it can be compiled."""

    kind: GrammarKind
    text: str
    schemas: tuple["EmbeddedSchema", ...] = ()  # what the text calls schema_0, schema_1, ...; it is the server's then
    field: str = "grammar"  # of the request that it came from
    strict: bool = False  # refused if a keyword of the schema cannot be enforced
    thoughts: Thoughts | None = None  # they may come before what it describes

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any], field: str = "grammar", strict: bool = False) -> Self:
        """The values that a JSON schema describes, given as text or as an object."""
        return cls(GrammarKind.JSON_SCHEMA, _text(schema), field=field, strict=strict)

    @classmethod
    def json_object(cls, field: str = "grammar") -> Self:
        """Any JSON object."""
        return cls(GrammarKind.JSON_SCHEMA, '{"type": "object"}', field=field)

    @classmethod
    def choice(cls, texts: Sequence[str], field: str = "grammar.choice") -> Self:
        """One of these texts. Raises InvalidRequestError if there are none, or too many to be written."""
        most = MAX_LENGTH[GrammarKind.LARK]
        if not 1 <= len(texts) <= most or sum(map(len, texts)) > most:
            description = f"give 1 to {most} texts, of at most {most} characters in total"
            raise InvalidRequestError(FieldViolation(field, description))
        alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return cls(GrammarKind.LARK, f"start: {alternatives}", field=field)

    def check(self) -> Iterator[FieldViolation]:
        """The parts that are too long. Only the shards can tell whether it compiles."""
        if not self.schemas:
            right = 0 < len(self.text) <= MAX_LENGTH[self.kind]
            yield from (
                () if right else [FieldViolation(self.field, f"must have 1 to {MAX_LENGTH[self.kind]} characters")]
            )
            return
        most = MAX_LENGTH[GrammarKind.JSON_SCHEMA]
        for schema in self.schemas:
            if len(schema.text) > most:
                yield FieldViolation(schema.field, f"{schema.owner}must have at most {most} characters")
        if sum(len(schema.text) for schema in self.schemas) > MAX_SCHEMAS_LENGTH:
            yield FieldViolation(self.field, f"schemas may have at most {MAX_SCHEMAS_LENGTH} characters in total")

    def refusal(self, error: InvalidRequestError) -> InvalidRequestError:
        """The compiler's error, with the request's names for the parts."""
        found = list[FieldViolation]()
        for violation in error.violations:
            schema = self._part(violation.field)
            found.append(FieldViolation(schema.field, schema.owner + violation.description))
        return InvalidRequestError(*found)

    def unenforced(self, part: str, keywords: Sequence[str]) -> str:
        """A warning that keywords of a schema are not enforced; the part as the compiler calls it. Raises
        InvalidRequestError if the schema is strict."""
        schema, names = self._part(part), ", ".join(keywords)
        if schema.strict:
            said = f"{schema.owner}is strict, and has keywords that cannot be enforced: {names}"
            raise InvalidRequestError(FieldViolation(schema.field, said))
        return f"{schema.field} {schema.owner}has keywords that are not enforced: {names}"

    def _part(self, name: str) -> "EmbeddedSchema":
        """The schema with the compiler's name, or what stands for the whole grammar."""
        parts = {f"grammar.schemas[{place}]": schema for place, schema in enumerate(self.schemas)}
        return parts.get(name) or EmbeddedSchema(self.text, self.field, strict=self.strict)


@dataclass(frozen=True, slots=True)
class EmbeddedSchema:
    """A JSON schema in a grammar. Its references start at its own root."""

    text: str
    field: str  # of the request that it came from
    owner: str = ""  # prefix that says whose schema it is, in error messages
    strict: bool = False  # as in a Grammar


def _text(schema: str | Mapping[str, Any]) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
