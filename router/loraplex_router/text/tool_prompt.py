"""Tools for models whose chat template does not support them, in the common form of Hermes: they are described in the
system message, calls are between <tool_call> tags, and results between <tool_response> tags."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"

INSTRUCTIONS = """You may call one or more functions to assist with the user query.
You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>
For each function call, return a JSON object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

Row = dict[str, Any]


def describe_tools(rows: Sequence[Row], tools: Sequence[Mapping[str, Any]], role: str = "system") -> list[Row]:
    """Messages with text content. The first one, with this role, describes the tools."""
    text = INSTRUCTIONS.format(signatures="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if rows and rows[0]["role"] == role:
        first, *rows = rows
        text = f"{first['content']}\n\n{text}" if role == "system" else f"{text}\n\n{first['content']}"
    return [{"role": role, "content": text}, *rows]


def without_tool_fields(row: Row) -> Row:
    """A message with text content, which includes its calls or their results."""
    if row["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{row['content']}\n</tool_response>"}
    calls = [_write_call(call["function"]) for call in row.get("tool_calls", ())]
    content = "\n".join(filter(None, (row["content"], *calls)))
    others = {name: value for name, value in row.items() if name not in ("tool_calls", "tool_call_id")}
    return {**others, "content": content}


def _write_call(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"{CALL_BEGIN}\n{json.dumps(call, ensure_ascii=False)}\n{CALL_END}"
