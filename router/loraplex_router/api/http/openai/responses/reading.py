"""Reads a body of /v1/responses as one of chat completions, which means the same."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError

from loraplex_protos.errors import FieldViolation, InvalidRequestError, quote
from loraplex_router.api.http.openai.chat import read_chat
from loraplex_router.api.http.openai.responses.schema import Format, Item, Part, ResponsesBody
from loraplex_router.api.http.openai.responses.tools import (
    custom_arguments,
    function_name,
    left_out,
    read_choice,
    read_tools,
    tool_fields,
)
from loraplex_router.api.http.openai.schema import ChatCompletionRequest
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.request import Request
from loraplex_router.vocabulary.sampling import Sampling
from loraplex_router.vocabulary.violations import Violations

TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # type -> its field
NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name"),
    "function_call_output": ("call_id",),
    "custom_tool_call": ("call_id", "name", "input"),
    "custom_tool_call_output": ("call_id",),
}
LOGPROBS = "message.output_text.logprobs"
WITHOUT_EFFECT = {"stream_options", "prompt_cache_options"}

# What OpenAI has besides, and what chat completions have, but a response has not.
UNSUPPORTED = {
    **dict.fromkeys(
        ("background", "conversation", "prompt", "context_management", "moderation"), "is not supported: leave it out"
    ),
    **dict.fromkeys(("n", "adapters", "prompt_logprobs", "echo"), "is not supported here, only in chat completions"),
    "messages": "is not a field of responses: send input",
    "functions": "is not a field of responses: send tools",
    "response_format": "is not a field of responses: send text.format",
}

Row = dict[str, Any]
ITEMS = TypeAdapter(list[Item])


def count_parts(body: ResponsesBody, kept: Sequence[Row]) -> int:
    """How many items there are to read, and parts of them."""
    items = [] if isinstance(body.input, str) else body.input
    fields = [field for item in items for field in (item.content, item.output)]
    fields += [item.get(name) for item in kept for name in ("content", "output")]
    return len(items) + len(kept) + sum(len(field) for field in fields if isinstance(field, list))


def read_as_chat(body: ResponsesBody, kept: Sequence[Row]) -> ChatCompletionRequest:
    """`kept`: the items that the input continues. Raises InvalidRequestError and RequestValidationError."""
    earlier = ITEMS.validate_python(kept)
    others = {name: value for name, value in (body.model_extra or {}).items() if value not in (None, False)}
    found = Violations()
    for name, description in UNSUPPORTED.items():
        found.check(name not in others, name, description)
    messages = _read_input(body, earlier, found)
    tools = read_tools(body, found)
    found.check(bool(messages), "input", "has no message")
    found.raise_any()
    wanted = body.text and body.text.format
    translated: Row = {
        **{name: value for name, value in others.items() if name not in WITHOUT_EFFECT},
        "model": body.model,
        "messages": messages,
        "tools": tools or None,
        "tool_choice": read_choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "logprobs": bool(body.top_logprobs) or LOGPROBS in (body.include or ()),
        "top_logprobs": body.top_logprobs,
    }
    if body.truncation == "auto":
        translated["truncate_prompt_tokens"] = -1
    if body.reasoning and body.reasoning.effort:
        translated["reasoning_effort"] = body.reasoning.effort
    if wanted:
        translated["response_format"] = _read_format(wanted)
    try:
        return ChatCompletionRequest.model_validate(translated)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def read_request(
    body: ResponsesBody,
    chat: ChatCompletionRequest,
    base: Sequence[str],
    defaults: Sampling,
    request_id: str,
    keeps: bool,
) -> Request:
    """`chat` is the same request for chat completions. `keeps`: responses can be kept. Raises InvalidRequestError, and
    AdapterNotFoundError for an empty adapter name."""
    try:
        request = read_chat(chat, base, defaults, request_id)
    except InvalidRequestError as error:
        found = (FieldViolation(_name_here(each.field, body), each.description) for each in error.violations)
        raise InvalidRequestError(*found) from error
    named = request.grammar and _named_as_here(request.grammar, body)
    return replace(request, grammar=named, warnings=request.warnings + _warnings(body, keeps))


def _warnings(body: ResponsesBody, keeps: bool) -> tuple[str, ...]:
    verbosity = (body.text and body.text.verbosity) or "medium"
    found = {"store: nothing is kept": body.store and not keeps, "text.verbosity is not applied": verbosity != "medium"}
    return (*(text for text, applies in found.items() if applies), *left_out(body))


def _named_as_here(grammar: Grammar, body: ResponsesBody) -> Grammar:
    schemas = tuple(replace(schema, field=_name_here(schema.field, body)) for schema in grammar.schemas)
    return replace(grammar, field=_name_here(grammar.field, body), schemas=schemas)


def _name_here(field: str, body: ResponsesBody) -> str:
    """What is called `field` in chat completions."""
    fields = tool_fields(body)
    placed = re.sub(r"^tools\[(\d+)\]", lambda found: fields[int(found[1])], field)
    return placed.replace("response_format", "text.format").replace(".function.", ".")


# ---- the conversation ----------------------------------------------------------------------------------------


def _read_input(body: ResponsesBody, earlier: Sequence[Item], found: Violations) -> list[Row]:
    """Calls belong to the assistant's message before them, as chat templates have it, and so does its reasoning.
    Instructions come before everything; many templates allow one system message only, so they take in those that
    follow."""
    items = [Item(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    rows: list[Row] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    thoughts = ""
    for place, item in enumerate((*earlier, *items), -len(earlier)):
        kind, name = item.type or "message", f"input[{place}]"
        if kind not in (*NEEDED, "reasoning"):
            found.check(False, name, f"is of type {quote(kind)}, which is not supported")
            continue
        missing = [field for field in NEEDED.get(kind, ()) if getattr(item, field) is None]
        found.check(not missing, name, f"of type {kind} needs {' and '.join(missing)}")
        match kind:
            case "reasoning":
                parts = item.content if isinstance(item.content, list) else []
                thoughts += "".join(part.text or "" for part in parts)
            case "function_call" | "custom_tool_call":
                if not rows or rows[-1]["role"] != "assistant":
                    rows.append({"role": "assistant", "content": None, **_reasoning(thoughts)})
                    thoughts = ""
                custom = kind == "custom_tool_call"
                arguments = custom_arguments(item.input or "") if custom else item.arguments or ""
                function = {"name": function_name(item.name, item.namespace), "arguments": arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                rows[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output" | "custom_tool_call_output":
                output = _read_parts(item.output or "", f"{name}[output]", found)
                rows.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
            case _:
                content = _read_parts(item.content or "", f"{name}[content]", found)
                own = _reasoning(thoughts) if item.role == "assistant" else {}
                thoughts = "" if own else thoughts
                _add_message(rows, {"role": item.role or "user", "content": content, **own})
    return rows


def _add_message(rows: list[Row], row: Row) -> None:
    if row["role"] in ("system", "developer") and len(rows) == 1 and rows[0]["role"] in ("system", "developer"):
        texts = [text for each in (rows[0], row) for text in _texts(each["content"])]
        rows[0] = {"role": "system", "content": "\n\n".join(texts)}
    else:
        rows.append(row)


def _texts(content: str | list[Row]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _reasoning(text: str) -> Row:
    return {"reasoning_content": text} if text else {}


def _read_parts(content: str | list[Part], name: str, found: Violations) -> str | list[Row]:
    """One text as it is, several as parts, which a chat template reads in its own way."""
    if isinstance(content, str):
        return content
    texts = list[str]()
    for at, part in enumerate(content):
        field = TEXTS.get(part.type)
        text = getattr(part, field) if field else None
        if text is None:
            wrong = f"has no {field}" if field else f"is of type {quote(part.type)}: the model reads text"
            found.check(False, f"{name}[{at}]", wrong)
        texts.append(text or "")
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def _read_format(wanted: Format) -> Row:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    return {
        "type": "json_schema",
        "json_schema": {"name": wanted.name, "schema": wanted.schema_, "strict": wanted.strict},
    }
