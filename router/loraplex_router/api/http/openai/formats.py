"""What an answer must match: OpenAI's response_format, vLLM's structured_outputs and guided_*, forced tool calls."""

from collections.abc import Iterator
from typing import Any

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.api.http.openai.schema import (
    ChatCompletionRequest,
    GenerationRequest,
    StructuredOutputs,
)
from loraplex_router.api.http.openai.tools import forced_tool
from loraplex_router.grammar import Grammar, GrammarKind

NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def read_format(body: GenerationRequest) -> Grammar | None:
    """None if any answer will do. Raises InvalidRequestError if more than one format is asked for."""
    found = dict(_formats(body))
    if len(found) > 1:
        raise InvalidRequestError(FieldViolation(list(found)[1], f"cannot be given together with {next(iter(found))}"))
    return next(iter(found.values()), None)


def _formats(body: GenerationRequest) -> Iterator[tuple[str, Grammar]]:
    if (wanted := body.response_format) and wanted.type != "text":
        schema = wanted.json_schema.schema_ if wanted.json_schema else wanted.schema_
        yield "response_format", Grammar.json_schema(schema) if schema is not None else Grammar.json_object()
    if body.structured_outputs:
        yield from _structured(body.structured_outputs, "structured_outputs.")
    guided = StructuredOutputs(
        json=body.guided_json, regex=body.guided_regex, choice=body.guided_choice, grammar=body.guided_grammar
    )
    yield from _structured(guided, "guided_")
    if isinstance(body, ChatCompletionRequest) and (forced := _forced_call(body)):
        yield "tool_choice", forced


def _structured(given: StructuredOutputs, prefix: str) -> Iterator[tuple[str, Grammar]]:
    if given.json_ is not None:
        yield f"{prefix}json", Grammar.json_schema(given.json_)
    if given.json_object:
        yield f"{prefix}json_object", Grammar.json_object()
    if given.regex is not None:
        yield f"{prefix}regex", Grammar(GrammarKind.REGEX, given.regex)
    if given.choice is not None:
        yield f"{prefix}choice", Grammar.choice(given.choice)
    if given.grammar is not None:
        yield f"{prefix}grammar", Grammar(GrammarKind.LARK, given.grammar)


def _forced_call(body: ChatCompletionRequest) -> Grammar | None:
    """A call of the named tool, or a list of calls of any; see text/tool_calls.py for who reads them."""
    choice, definitions = forced_tool(body), dict[str, Any]()
    calls = dict[str, dict[str, Any]]()
    for tool in body.tools or ():
        parameters = dict(tool.function.parameters or NO_PARAMETERS)
        definitions |= parameters.pop("$defs", {})  # references to them start at the root
        properties = {"name": {"const": tool.function.name}, "arguments": parameters}
        call = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        calls[tool.function.name] = call
    if choice is not None:
        return Grammar.json_schema({**calls[choice], "$defs": definitions})
    if body.tool_choice != "required":
        return None
    most = {"maxItems": 1} if body.parallel_tool_calls is False else {}
    items = {"anyOf": list(calls.values())}
    return Grammar.json_schema({"type": "array", "items": items, "minItems": 1, **most, "$defs": definitions})
