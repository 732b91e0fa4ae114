"""Tools of responses. To the model all are functions: a namespace's have its name in front, and a custom tool, which
takes a text, has it as its only parameter."""

from collections.abc import Iterator
from typing import Any

import orjson

from loraplex_protos.errors import quote
from loraplex_router.api.http.openai.responses.schema import Choice, ResponsesBody, Tool
from loraplex_router.vocabulary.violations import Violations

INPUT = "input"
CUSTOM = {
    "type": "object",
    "properties": {INPUT: {"type": "string"}},
    "required": [INPUT],
    "additionalProperties": False,
}

# Tools that OpenAI's servers run. Programs offer them without knowing whether the server has them.
HOSTED = (
    *("web_search", "file_search", "code_interpreter", "image_generation", "computer", "mcp", "tool_search"),
    *("local_shell", "shell", "apply_patch", "programmatic_tool_calling"),
)

Row = dict[str, Any]


def function_name(name: str | None, namespace: str | None = None) -> str:
    """What the model calls the tool."""
    return f"{namespace}__{name}" if namespace else name or ""


def read_tools(body: ResponsesBody, found: Violations) -> list[Row]:
    """As chat completions have them, without those that OpenAI's servers run."""
    return [_read_tool(tool, namespace, field, found) for field, tool, namespace in _tools(body) if not _hosted(tool)]


def tool_fields(body: ResponsesBody) -> list[str]:
    """Where the body has each tool that chat completions have."""
    return [field for field, tool, _ in _tools(body) if not _hosted(tool)]


def left_out(body: ResponsesBody) -> tuple[str, ...]:
    """A warning for each tool, or part of one, that the request goes without."""
    hosted = [
        f"{field} is left out: this server has no {tool.type}" for field, tool, _ in _tools(body) if _hosted(tool)
    ]
    free = [
        f"{field}.format is not enforced" for field, tool, _ in _tools(body) if (tool.format or {}).get("definition")
    ]
    return (*hosted, *free)


def calls_by_function(body: ResponsesBody) -> dict[str, Row]:
    """How a call of each function is shown: its type, its name and, if it has one, its namespace."""
    return {
        function_name(tool.name, namespace): {
            "type": "custom_tool_call" if tool.type == "custom" else "function_call",
            "name": tool.name,
            **({"namespace": namespace} if namespace else {}),
        }
        for _, tool, namespace in _tools(body)
        if not _hosted(tool)
    }


def read_choice(choice: str | Choice | None) -> str | Row | None:
    """As chat completions have it."""
    if not isinstance(choice, Choice):
        return choice
    if choice.type != "allowed_tools":
        return {"type": "function", "function": {"name": function_name(choice.name, choice.namespace)}}
    tools = [read_choice(tool) for tool in choice.tools or ()]
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode or "auto", "tools": tools}}


def custom_arguments(text: str) -> str:
    """The arguments of the function that a custom tool is to the model."""
    return orjson.dumps({INPUT: text}).decode()


def custom_input(arguments: str) -> str:
    """The text that a custom tool was called with; of an answer that was cut off, what there is."""
    try:
        return str(orjson.loads(arguments)[INPUT])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return arguments


def _tools(body: ResponsesBody) -> Iterator[tuple[str, Tool, str | None]]:
    """Each with its field, and the namespace that it is in."""
    for place, tool in enumerate(body.tools or ()):
        field = f"tools[{place}]"
        if tool.type == "namespace":
            for inner, each in enumerate(tool.tools or ()):
                yield f"{field}.tools[{inner}]", each, tool.name
        else:
            yield field, tool, None


def _hosted(tool: Tool) -> bool:
    return tool.type.startswith(HOSTED)


def _read_tool(tool: Tool, namespace: str | None, field: str, found: Violations) -> Row:
    known = tool.type in ("function", "custom")
    found.check(known, field, f"is of type {quote(tool.type)}, which is not supported")
    found.check(not known or bool(tool.name), field, "needs a name")
    function = {"name": function_name(tool.name, namespace), "description": tool.description, "strict": tool.strict}
    if tool.type != "custom":
        return {"type": "function", "function": {**function, "parameters": tool.parameters}}
    definition = (tool.format or {}).get("definition")
    described = [tool.description, definition and f"The input follows this grammar:\n{definition}"]
    text = "\n\n".join(filter(None, described)) or None
    return {"type": "function", "function": {**function, "description": text, "parameters": CUSTOM}}
