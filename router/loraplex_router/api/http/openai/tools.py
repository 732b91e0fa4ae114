"""Tools of a chat completion: which ones the prompt describes, and which ones the answer may call."""

from typing import Any

from loraplex_protos.errors import quote
from loraplex_router.api.calls import AnswerReader
from loraplex_router.api.http.conversation import Tool
from loraplex_router.api.http.openai.schema import AllowedToolsChoice, ChatCompletionRequest, NamedFunction, NamedTool
from loraplex_router.vocabulary.thoughts import Thoughts
from loraplex_router.vocabulary.violations import Violations

CHOICES = (None, "none", "auto", "required")  # any other text names a tool, as in LoRAX


def with_tools(body: ChatCompletionRequest) -> ChatCompletionRequest:
    """The body with OpenAI's older `functions`, if it has any, as tools of which at most one is called. Raises
    InvalidRequestError."""
    functions, choice = body.functions, body.function_call
    found = Violations()
    found.check(not (functions and body.tools), "functions", "cannot be given together with tools")
    found.check(bool(functions) or not isinstance(choice, NamedFunction), "function_call", "needs functions")
    found.raise_any()
    if not functions:
        return body
    sent = [{"type": "function", "function": each.model_dump(exclude_unset=True)} for each in functions]
    update = {
        "tools": [Tool.model_validate(tool) for tool in sent],
        "tool_choice": NamedTool(function=choice) if isinstance(choice, NamedFunction) else choice,
        "parallel_tool_calls": False,
    }
    return body.model_copy(update=update)


def may_call(body: ChatCompletionRequest) -> bool:
    """Whether the answer may contain calls. If not, the prompt does not mention tools."""
    return bool(body.tools) and body.tool_choice != "none"


def must_call(body: ChatCompletionRequest) -> bool:
    """Whether the answer only consists of calls."""
    choice = body.tool_choice
    if isinstance(choice, AllowedToolsChoice):
        return choice.allowed_tools.mode == "required"
    return choice == "required" or forced_tool(body) is not None


def check_tools(body: ChatCompletionRequest, found: Violations) -> None:
    names = [tool.function.name for tool in body.tools or ()]
    found.check(len(set(names)) == len(names), "tools", "must have different names")
    for chosen in sorted(callable_tools(body).difference(names)):
        found.check(False, "tool_choice", f"there is no tool {quote(chosen)}")
    found.check(body.tool_choice != "required" or bool(names), "tool_choice", "needs tools")


def callable_tools(body: ChatCompletionRequest) -> set[str]:
    """The names of the tools that the answer may call, if it may call any."""
    choice = body.tool_choice
    if isinstance(choice, AllowedToolsChoice):
        return {tool.function.name for tool in choice.allowed_tools.tools}
    chosen = forced_tool(body)
    return {tool.function.name for tool in body.tools or ()} if chosen is None else {chosen}


def forced_tool(body: ChatCompletionRequest) -> str | None:
    """The name of the only tool that must be called."""
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        return choice.function.name
    return choice if isinstance(choice, str) and choice not in CHOICES else None


def create_reader(body: ChatCompletionRequest, thoughts: Thoughts | None) -> AnswerReader:
    names = callable_tools(body) if may_call(body) else set[str]()
    separated = thoughts if body.separate_reasoning is not False else None
    return AnswerReader(names, must_call(body), body.parallel_tool_calls is not False, separated)


def write_call(name: str, id: str) -> dict[str, Any]:
    """A call whose arguments have not arrived yet."""
    return {"id": f"call_{id}", "type": "function", "function": {"name": name, "arguments": ""}}
