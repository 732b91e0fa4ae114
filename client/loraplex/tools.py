"""Functions that the model may call."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

from loraplex.schemas import explain, schema_of, validator_of
from loraplex_protos.errors import FieldViolation, InvalidRequestError


@dataclass(frozen=True, slots=True)
class Tool:
    """A function as it is described to the model. Functions in a list of tools become Tools by themselves."""

    name: str
    """At most 64 characters of A-Z a-z 0-9 . _ -"""
    description: str = ""
    parameters: Mapping[str, object] | None = None
    """The JSON schema of its arguments, of the type "object". None: it takes none."""
    strict: bool = False
    """Refuse a forced call if a keyword of the schema cannot be enforced. Otherwise, a warning names the keyword."""
    function: Callable[..., object] | None = None
    """What `Conversation` calls, with the arguments by name."""

    @classmethod
    def of(cls, function: Callable[..., object]) -> Self:
        """Described by its name, its docstring, and its parameters' annotations, as pydantic reads them:
        `Annotated[int, Field(description=...)]` describes a parameter. Raises InvalidRequestError if it cannot be
        called with named arguments."""
        name = getattr(function, "__name__", None)
        if not callable(function) or name is None:
            raise _refusal(f"{function!r} is not a Tool or a function with a name")
        parameters = schema_of(function)
        if parameters.get("type") != "object":
            raise _refusal(f"{name} has parameters without a name")
        return cls(name, inspect.getdoc(function) or "", parameters, function=function)

    def call(self, arguments: str) -> object:
        """What the function returns; of a coroutine function, something to await. Raises what the function raises, and
        pydantic's ValidationError for arguments that it does not take."""
        assert self.function is not None
        return validator_of(self.function).validate_json(arguments or "{}")


# A mapping has the form of OpenAI's API: {"type": "function", "function": {"name": ..., "parameters": ...}}.
AnyTool: TypeAlias = Tool | Callable[..., object] | Mapping[str, Any]


def read_tools(given: Sequence[AnyTool]) -> tuple[Tool, ...]:
    """Raises InvalidRequestError for anything else."""
    return tuple(map(_read, given))


def _read(given: AnyTool) -> Tool:
    if isinstance(given, Tool):
        return given
    if not isinstance(given, Mapping):
        return Tool.of(given)
    try:
        fields = {name: value for name, value in given["function"].items() if value is not None}
        return Tool(**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise _refusal(f"{given!r} is not a function in the form of OpenAI's API") from error


def write_result(result: object) -> str:
    """What the model gets to read: text as it is, an exception's type and text, everything else as JSON."""
    if isinstance(result, str):
        return result
    if isinstance(result, Exception):
        return f"error: {type(result).__name__}: {explain(result)}"
    from pydantic_core import to_json

    return to_json(result, fallback=str).decode()


def _refusal(description: str) -> InvalidRequestError:
    return InvalidRequestError(FieldViolation("tools", description))
