"""Tools of a chat completion: what the prompt says of them, and what the answer may call."""

import json
import secrets
from typing import Any

from loraplex_router.api.http.openai.schema import ChatCompletionRequest, NamedTool
from loraplex_router.request import Violations
from loraplex_router.text.tool_calls import ToolCallParser

CHOICES = (None, "none", "auto", "required")  # any other text names a tool, as in LoRAX


def offered_tools(body: ChatCompletionRequest) -> tuple[dict[str, Any], ...]:
    """The tools that the model is told of: those given, unless none may be called."""
    if body.tool_choice == "none":
        return ()
    return tuple(tool.model_dump(exclude_none=True) for tool in body.tools or ())


def check_tools(body: ChatCompletionRequest, found: Violations) -> None:
    names = [tool.function.name for tool in body.tools or ()]
    found.check(len(set(names)) == len(names), "tools", "must have different names")
    chosen = forced_tool(body)
    found.check(chosen is None or chosen in names, "tool_choice", f"there is no tool {chosen!r}")
    found.check(body.tool_choice != "required" or bool(names), "tool_choice", "needs tools")


def forced_tool(body: ChatCompletionRequest) -> str | None:
    """The name of the one tool that is to be called."""
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        return choice.function.name
    return None if choice in CHOICES else choice


def create_parser(body: ChatCompletionRequest) -> ToolCallParser | None:
    """None if the answer can hold no calls."""
    tools = offered_tools(body)
    return ToolCallParser({tool["function"]["name"] for tool in tools}) if tools else None


def write_call(name: str) -> dict[str, Any]:
    """A call whose arguments are still to come."""
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": ""}}


def read_arguments(arguments: str) -> Any:
    """As templates want those of earlier calls: the object itself, where the text is one."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments
