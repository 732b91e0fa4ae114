"""Tools of a chat completion: what the prompt says of them, and what the answer may call."""

import secrets
from typing import Any

from loraplex_protos.errors import quote
from loraplex_router.api.http.openai.schema import ChatCompletionRequest, NamedTool
from loraplex_router.text.tool_calls import ToolCallParser
from loraplex_router.vocabulary.violations import Violations

CHOICES = (None, "none", "auto", "required")  # any other text names a tool, as in LoRAX


def may_call(body: ChatCompletionRequest) -> bool:
    """Whether the answer can hold calls. If not, the model is told of no tools."""
    return bool(body.tools) and body.tool_choice != "none"


def must_call(body: ChatCompletionRequest) -> bool:
    """Whether the answer is nothing but calls."""
    return body.tool_choice == "required" or forced_tool(body) is not None


def check_tools(body: ChatCompletionRequest, found: Violations) -> None:
    names = [tool.function.name for tool in body.tools or ()]
    found.check(len(set(names)) == len(names), "tools", "must have different names")
    chosen = forced_tool(body)
    found.check(chosen is None or chosen in names, "tool_choice", f"there is no tool {quote(chosen or '')}")
    found.check(body.tool_choice != "required" or bool(names), "tool_choice", "needs tools")


def forced_tool(body: ChatCompletionRequest) -> str | None:
    """The name of the one tool that is to be called."""
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        return choice.function.name
    return None if choice in CHOICES else choice


def create_parser(body: ChatCompletionRequest) -> ToolCallParser | None:
    """None if the answer can hold no calls."""
    names = {tool.function.name for tool in body.tools or ()}
    return ToolCallParser(names, calls_alone=must_call(body)) if may_call(body) else None


def write_call(name: str) -> dict[str, Any]:
    """A call whose arguments are still to come."""
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": ""}}
