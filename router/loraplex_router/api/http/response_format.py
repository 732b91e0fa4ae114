"""response_format in OpenAI's, LoRAX's and text-generation-inference's form, for all routes."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.api.http.fields import STRICT
from loraplex_router.vocabulary.grammar import Grammar, GrammarKind

TEXTS = {"regex": GrammarKind.REGEX, "grammar": GrammarKind.LARK}


class NamedSchema(BaseModel):
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description=STRICT)


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema", "json", "regex", "grammar"]
    json_schema: NamedSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", description="LoRAX's. Absent: any object.")
    value: str | dict[str, Any] | None = Field(default=None, description="text-generation-inference's.")


def read_response_format(wanted: ResponseFormat, field: str) -> Grammar | None:
    """None if any text will do. Raises InvalidRequestError if a field that the type needs is missing."""
    if wanted.type == "text":
        return None
    if wanted.type in TEXTS:
        if not isinstance(wanted.value, str):
            raise InvalidRequestError(FieldViolation(field, f'of type "{wanted.type}" needs a value, the text of it'))
        return Grammar(TEXTS[wanted.type], wanted.value, field=field)
    named = wanted.json_schema.schema_ if wanted.json_schema else None
    for schema in (named, wanted.schema_, wanted.value):
        if schema is not None:
            return Grammar.json_schema(schema, field, bool(wanted.json_schema and wanted.json_schema.strict))
    if wanted.type == "json_object":
        return Grammar.json_object(field)
    raise InvalidRequestError(FieldViolation(field, f'of type "{wanted.type}" needs a schema'))
