"""Converts messages from the clients' form to the form that a template reads."""

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from loraplex_router.text.json_limits import parse
from loraplex_router.text.template_traits import CallIds, Row, Traits, write_blank
from loraplex_router.text.tool_prompt import describe_tools, without_tool_fields

_FORMS = {CallIds.SHORT: re.compile(r"[A-Za-z0-9]{9}"), CallIds.NUMBERED: re.compile(r"functions\.[^:]+:\d+")}


def adapt(messages: Sequence[Row], tools: Sequence[Mapping[str, Any]] | None, traits: Traits) -> list[Row]:
    """Only changes what the template does not read as it is. Tools, calls and results that it would not show become
    text. Null fields are left out, as in transformers."""
    rows = [{name: value for name, value in row.items() if value is not None} for row in messages]
    if not traits.knows_developer:
        rows = [{**row, "role": "system"} if row["role"] == "developer" else row for row in rows]
    described = bool(tools) and not traits.reads_tools

    def is_hidden(row: Row) -> bool:
        hidden = traits.hides_results if row["role"] == "tool" else traits.hides_calls and row.get("tool_calls")
        return described or bool(hidden)

    rows = [
        without_tool_fields(_with_text(_with_arguments(row, as_text=False))) if is_hidden(row) else row for row in rows
    ]
    if tools and described:
        rows = describe_tools(rows, tools, "system" if traits.takes_system else "user")
    rows = _with_ids(rows, traits.call_ids)
    return [_with_content(_with_arguments(row, traits.arguments_as_text), traits) for row in rows]


def complete(tools: Sequence[Row], traits: Traits) -> list[Row]:
    """The tools, with the fields that this template needs, but clients may leave out or set to null."""
    return [{**tool, "function": _complete(tool["function"], traits.tool_needs)} for tool in tools]


def _complete(function: Row, needs: frozenset[str]) -> Row:
    given = {name: value for name, value in function.items() if value is not None}
    if "description" in needs:
        given.setdefault("description", "")
    if needs & {"parameters", "properties"}:
        empty = {"type": "object", "properties": {}}
        given["parameters"] = (empty if "properties" in needs else {}) | given.get("parameters", empty)
    return given


def _with_ids(rows: list[Row], form: CallIds) -> list[Row]:
    """Ids of calls come from clients and other servers; some templates only accept their model's form."""
    if form is CallIds.ANY:
        return rows
    renamed, count, changed = dict[object, str](), 0, list[Row]()
    for row in rows:
        calls = []
        for call in row.get("tool_calls", ()):
            given = call.get("id")
            own = {
                CallIds.SHORT: sha256(f"{given or count}".encode()).hexdigest()[:9],
                CallIds.NUMBERED: f"functions.{call['function']['name']}:{count}",
            }[form]
            renamed[given] = given if isinstance(given, str) and _FORMS[form].fullmatch(given) else own
            calls.append({**call, "id": renamed[given]})
            count += 1
        result = {"tool_call_id": renamed[row["tool_call_id"]]} if row.get("tool_call_id") in renamed else {}
        changed.append({**row, **({"tool_calls": calls} if calls else {}), **result})
    return changed


def _with_arguments(row: Row, as_text: bool) -> Row:
    if not row.get("tool_calls"):
        return row
    calls = [
        {**call, "function": {**call["function"], "arguments": _read(call["function"].get("arguments"), as_text)}}
        for call in row["tool_calls"]
    ]
    return {**row, "tool_calls": calls}


def _read(arguments: Any, as_text: bool) -> Any:
    """Clients return calls without arguments in many forms."""
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        arguments = {}
    if as_text:
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    try:
        return parse(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments  # the model's own text


def _with_content(row: Row, traits: Traits) -> Row:
    content, calls = row.get("content"), bool(row.get("tool_calls"))
    if content is None or (content == "" and calls and traits.empty_hides_calls):
        return write_blank(row, traits.blank_call if calls else traits.blank)
    if isinstance(content, str):
        needs_parts = row["role"] in traits.needs_parts
        return {**row, "content": [{"type": "text", "text": content}]} if needs_parts else row
    return row if row["role"] in traits.takes_parts else _with_text(row)


def _with_text(row: Row) -> Row:
    """Parts become lines of one text, as vLLM and llama.cpp write them."""
    content = row.get("content") or ""
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    return {**row, "content": text}
