"""Messages as clients write them -> as a template reads them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loraplex_router.json_limits import parse
from loraplex_router.text.template_traits import Row, Traits, write_blank
from loraplex_router.text.tool_prompt import describe_tools, without_tool_fields


def adapt(messages: Sequence[Row], tools: Sequence[Mapping[str, Any]] | None, traits: Traits) -> list[Row]:
    """Nothing is changed that the template reads as it is. Tools, calls and their results that it would not show become
    text. Fields that are null are left out, as transformers does it."""
    rows = [{name: value for name, value in row.items() if value is not None} for row in messages]
    if not traits.knows_developer:
        rows = [{**row, "role": "system"} if row["role"] == "developer" else row for row in rows]
    described = bool(tools) and not traits.reads_tools
    if described or (traits.hides_calls and any(row.get("tool_calls") for row in rows)):
        rows = [without_tool_fields(_with_text(_with_arguments(row, as_text=False))) for row in rows]
    elif traits.hides_results:
        rows = [without_tool_fields(_with_text(row)) if row["role"] == "tool" else row for row in rows]
    if tools and described:
        rows = describe_tools(rows, tools)
    return [_with_content(_with_arguments(row, traits.arguments_as_text), traits) for row in rows]


def _with_arguments(row: Row, as_text: bool) -> Row:
    if not row.get("tool_calls"):
        return row
    calls = [
        {**call, "function": {**call["function"], "arguments": _read(call["function"].get("arguments"), as_text)}}
        for call in row["tool_calls"]
    ]
    return {**row, "tool_calls": calls}


def _read(arguments: Any, as_text: bool) -> Any:
    """Clients send a call without arguments back in many ways."""
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        arguments = {}
    if as_text:
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    try:
        return parse(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments  # as the model wrote it


def _with_content(row: Row, traits: Traits) -> Row:
    content, calls = row.get("content"), bool(row.get("tool_calls"))
    if content is None or (content == "" and calls and traits.empty_hides_calls):
        return write_blank(row, traits.blank_call if calls else traits.blank)
    if isinstance(content, str):
        needs_parts = row["role"] in traits.needs_parts
        return {**row, "content": [{"type": "text", "text": content}]} if needs_parts else row
    return row if row["role"] in traits.takes_parts else _with_text(row)


def _with_text(row: Row) -> Row:
    """Parts are put together."""
    content = row.get("content") or ""
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return {**row, "content": text}
