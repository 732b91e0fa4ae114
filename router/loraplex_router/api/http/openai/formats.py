"""What an answer must match: OpenAI's response_format, vLLM's structured_outputs and guided_*, llama.cpp's json_schema
and grammar, SGLang's regex and ebnf, forced tool calls."""

from collections.abc import Iterator
from dataclasses import replace

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.api.calls import DeclaredTool, forced_calls
from loraplex_router.api.http.openai.schema import (
    ChatCompletionRequest,
    GenerationRequest,
    StructuredOutputs,
)
from loraplex_router.api.http.openai.tools import callable_tools, forced_tool, must_call
from loraplex_router.api.http.response_format import read_response_format
from loraplex_router.vocabulary.grammar import Grammar, GrammarKind

OTHER_TEXTS = {"regex": GrammarKind.REGEX, "grammar": GrammarKind.LARK, "ebnf": GrammarKind.LARK}  # "" is absent


def read_format(body: GenerationRequest) -> Grammar | None:
    """None if any answer will do. A forced call of a tool comes before any other format, as in vLLM. Raises
    InvalidRequestError if different formats are given."""
    if isinstance(body, ChatCompletionRequest) and (forced := _forced_call(body)):
        return forced
    found = list(_formats(body))
    for other in found[1:]:  # guidance sends the same one under two names
        if replace(other, field=found[0].field) != found[0]:
            raise InvalidRequestError(FieldViolation(other.field, f"cannot be given together with {found[0].field}"))
    return found[0] if found else None


def _formats(body: GenerationRequest) -> Iterator[Grammar]:
    if body.response_format and (wanted := read_response_format(body.response_format, "response_format")):
        yield wanted
    if body.structured_outputs:
        yield from _structured(body.structured_outputs, "structured_outputs.")
    guided = StructuredOutputs(
        json=body.guided_json, regex=body.guided_regex, choice=body.guided_choice, grammar=body.guided_grammar
    )
    yield from _structured(guided, "guided_")
    if body.json_schema:
        yield Grammar.json_schema(body.json_schema, "json_schema")
    for field, kind in OTHER_TEXTS.items():
        if text := getattr(body, field):
            yield Grammar(kind, text, field=field)


def _structured(given: StructuredOutputs, prefix: str) -> Iterator[Grammar]:
    if given.structural_tag is not None:
        raise InvalidRequestError(FieldViolation(f"{prefix}structural_tag", "is not supported: leave it out"))
    if given.json_ is not None:
        yield Grammar.json_schema(given.json_, f"{prefix}json")
    if given.json_object:
        yield Grammar.json_object(f"{prefix}json_object")
    if given.regex is not None:
        yield Grammar(GrammarKind.REGEX, given.regex, field=f"{prefix}regex")
    if given.choice is not None:
        yield Grammar.choice(given.choice, f"{prefix}choice")
    if given.grammar is not None:
        yield Grammar(GrammarKind.LARK, given.grammar, field=f"{prefix}grammar")


def _forced_call(body: ChatCompletionRequest) -> Grammar | None:
    if not must_call(body):
        return None
    names = callable_tools(body)
    tools = [
        DeclaredTool(
            tool.function.name,
            tool.function.parameters,
            f"functions[{place}].parameters" if body.functions else f"tools[{place}].function.parameters",
            bool(tool.function.strict),
        )
        for place, tool in enumerate(body.tools or ())
        if tool.function.name in names
    ]
    return forced_calls(tools, forced_tool(body), body.parallel_tool_calls is not False)
