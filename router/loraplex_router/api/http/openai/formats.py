"""What an answer must match: OpenAI's response_format, vLLM's structured_outputs and guided_*, llama.cpp's json_schema
and grammar, SGLang's regex and ebnf, forced tool calls."""

from collections.abc import Iterator

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.api.http.calls import DeclaredTool, forced_calls
from loraplex_router.api.http.openai.schema import (
    ChatCompletionRequest,
    GenerationRequest,
    StructuredOutputs,
)
from loraplex_router.api.http.openai.tools import forced_tool, must_call
from loraplex_router.api.http.response_format import read_response_format
from loraplex_router.vocabulary.grammar import Grammar, GrammarKind

OTHER_TEXTS = {"regex": GrammarKind.REGEX, "grammar": GrammarKind.LARK, "ebnf": GrammarKind.LARK}  # "" is absent


def read_format(body: GenerationRequest) -> Grammar | None:
    """None if any answer will do. Raises InvalidRequestError if more than one format is given."""
    found = list(_formats(body))
    if len(found) > 1:
        raise InvalidRequestError(FieldViolation(found[1].field, f"cannot be given together with {found[0].field}"))
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
    if isinstance(body, ChatCompletionRequest) and (forced := _forced_call(body)):
        yield forced


def _structured(given: StructuredOutputs, prefix: str) -> Iterator[Grammar]:
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
    tools = [
        DeclaredTool(tool.function.name, tool.function.parameters, f"tools[{place}].function.parameters")
        for place, tool in enumerate(body.tools or ())
    ]
    return forced_calls(tools, forced_tool(body), body.parallel_tool_calls is not False)
