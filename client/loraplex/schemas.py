"""JSON schemas of Python's types and functions, and their values. Pydantic is imported where it is needed:
most programs do not need it, and it takes a while."""

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MOST_KEPT = 256


@lru_cache(MOST_KEPT)
def validator_of(kind: Any) -> "TypeAdapter[Any]":
    """Reads values of a type, or calls a function."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


@lru_cache(MOST_KEPT)
def schema_of(kind: Any) -> Mapping[str, Any]:
    """The schema of a type's values, or of a function's arguments. Raises TypeError if there is none."""
    from pydantic import PydanticUserError
    from pydantic.json_schema import GenerateJsonSchema

    class ForModels(GenerateJsonSchema):
        def field_title_should_be_set(self, schema: Any) -> bool:
            """It only repeats the field's name."""
            return False

        def decimal_schema(self, schema: Any) -> dict[str, Any]:
            """A number, although pydantic reads texts, too: their pattern cannot be enforced."""
            found = super().decimal_schema(schema)
            return next(each for each in found["anyOf"] if each["type"] == "number")

    try:
        return validator_of(kind).json_schema(schema_generator=ForModels)
    except PydanticUserError as error:
        raise TypeError(f"{kind!r} cannot be described: {error.message.splitlines()[0]}") from error


def explain(error: Exception) -> str:
    """An error of pydantic in one line, without the links; the text of any other."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(
        ".".join(map(str, each["loc"])) + ": " * bool(each["loc"]) + each["msg"] for each in error.errors()
    )
