"""Reads a body of /v1/messages: its conversation as chat templates know it, and the router's Request."""

from collections.abc import Iterator, Sequence
from typing import Any

from loraplex_protos.errors import quote
from loraplex_router.api.calls import AnswerReader, DeclaredTool, forced_calls
from loraplex_router.api.http.messages.schema import Block, Content, ConversationBody, MessagesBody, Turn
from loraplex_router.api.http.model_names import read_model_name
from loraplex_router.vocabulary.chat import Chat, Message
from loraplex_router.vocabulary.chat import Content as MessageContent
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.request import Request
from loraplex_router.vocabulary.sampling import Sampling
from loraplex_router.vocabulary.thoughts import Thoughts
from loraplex_router.vocabulary.violations import Violations

NEEDED = {  # fields, by the type of a block
    "text": ("text",),
    "thinking": ("thinking",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}
ALLOWED = {  # types of blocks, by the role of their message
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking"),
    "system": ("text",),
}


def read_request(body: MessagesBody, base: Sequence[str], defaults: Sampling, request_id: str) -> Request:
    """`base`: the base model's names. `request_id` is the headers'. Raises InvalidRequestError, and
    AdapterNotFoundError for an empty adapter name."""
    return Request(
        prompt=read_chat(body),
        request_id=request_id,
        adapter=read_model_name(body.model, base),
        sampling=Sampling(**{"temperature": 1.0, **defaults.given, **body.given}),
        max_new_tokens=body.max_tokens,
        fewer_if_full=True,
        stop=tuple(body.stop_sequences or ()),
        grammar=_read_grammar(body),
        separates_thoughts=True,
        warnings=_warnings(body),
    )


def read_chat(body: ConversationBody) -> Chat:
    """Raises InvalidRequestError."""
    found = Violations()
    _check_tools(body, found)
    messages = [Message("system", _read_text(body.system, "system", found))] if body.system else []
    for place, turn in enumerate(body.messages):
        messages += _read_turn(turn, f"messages[{place}][content]", found)
    continued = body.messages[-1].role == "assistant"
    called = continued and "tool_calls" in messages[-1].fields
    found.check(not called, f"messages[{len(body.messages) - 1}]", "calls tools: their results must follow")
    found.raise_any()
    return Chat(
        tuple(messages),
        tuple(_write_tool(tool.name, tool.description, tool.input_schema) for tool in body.tools or ())
        if _may_call(body)
        else (),
        variables=_variables(body),
        generation_prompt=not continued,
        continue_final_message=continued,
    )


def create_reader(body: MessagesBody, thoughts: Thoughts | None) -> AnswerReader:
    names = {tool.name for tool in body.tools or ()} if _may_call(body) else set[str]()
    return AnswerReader(names, _must_call(body), _may_call_several(body), thoughts)


def _warnings(body: MessagesBody) -> tuple[str, ...]:
    """What is not as the request has it."""
    budget = body.thinking and body.thinking.budget_tokens is not None
    found = {
        "thinking.budget_tokens is not enforced": budget,
        "context_management is not applied": body.context_management,
    }
    return tuple(text for text, applies in found.items() if applies)


def _read_turn(turn: Turn, name: str, found: Violations) -> Iterator[Message]:
    """Each result of a tool becomes a message of its own."""
    if isinstance(turn.content, str):
        yield Message(turn.role, turn.content)
        return
    texts, calls, thoughts, begun = list[Block](), list[dict[str, Any]](), list[str](), False
    for at, block in enumerate(turn.content):
        if not _is_right(block, ALLOWED[turn.role], f"{name}[{at}]", found):
            continue
        match block.type:
            case "text":
                texts.append(block)
            case "thinking":
                thoughts.append(block.thinking or "")
            case "tool_use":
                calls.append(
                    {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
                )
            case _:
                if texts:
                    yield Message(turn.role, _as_content(texts))
                    texts = []
                begun = True
                fields = {"tool_call_id": block.tool_use_id} | ({"is_error": True} if block.is_error else {})
                yield Message("tool", _read_text(block.content or "", f"{name}[{at}][content]", found), fields)
    if texts or not begun:
        said: dict[str, Any] = {"tool_calls": calls} if calls else {}
        yield Message(
            turn.role, _as_content(texts), said | ({"reasoning_content": "".join(thoughts)} if thoughts else {})
        )


def _read_text(content: Content, name: str, found: Violations) -> MessageContent:
    if isinstance(content, str):
        return content
    return _as_content(
        [block for at, block in enumerate(content) if _is_right(block, ("text",), f"{name}[{at}]", found)]
    )


def _as_content(texts: Sequence[Block]) -> MessageContent:
    """One text as it is, several as parts, which a chat template reads in its own way."""
    if len(texts) == 1:
        return texts[0].text
    return [{"type": "text", "text": block.text} for block in texts] or None


def _is_right(block: Block, allowed: Sequence[str], name: str, found: Violations) -> bool:
    if block.type not in allowed:
        found.check(False, name, f"is of type {quote(block.type)}: only {', '.join(allowed)} can be read here")
        return False
    missing = [field for field in NEEDED[block.type] if getattr(block, field) is None]
    if missing:
        found.check(False, name, f"of type {block.type} needs {' and '.join(missing)}")
    return not missing


def _variables(body: ConversationBody) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if body.thinking and body.thinking.type != "adaptive":
        said["enable_thinking"] = body.thinking.type == "enabled"
    if body.output_config and body.output_config.effort:
        said["reasoning_effort"] = body.output_config.effort
    return said | (body.chat_template_kwargs or {})


# ---- tools ---------------------------------------------------------------------------------------------------


def _check_tools(body: ConversationBody, found: Violations) -> None:
    tools, choice = body.tools or (), body.tool_choice
    names = [tool.name for tool in tools]
    for place, tool in enumerate(tools):
        own = tool.type in (None, "custom")
        found.check(own, f"tools[{place}]", f"is of type {quote(tool.type or '')}: only custom tools are supported")
        found.check(not own or tool.input_schema is not None, f"tools[{place}]", "needs an input_schema")
    found.check(len(set(names)) == len(names), "tools", "must have different names")
    if choice and choice.type == "tool":
        found.check(choice.name in names, "tool_choice", f"there is no tool {quote(choice.name or '')}")
    found.check(not choice or choice.type != "any" or bool(names), "tool_choice", "needs tools")


def _may_call(body: ConversationBody) -> bool:
    """Whether the answer may contain calls. If not, the prompt does not mention tools."""
    return bool(body.tools) and not (body.tool_choice and body.tool_choice.type == "none")


def _must_call(body: ConversationBody) -> bool:
    return body.tool_choice is not None and body.tool_choice.type in ("any", "tool")


def _may_call_several(body: ConversationBody) -> bool:
    return not (body.tool_choice and body.tool_choice.disable_parallel_tool_use)


def _write_tool(name: str, description: str | None, schema: dict[str, Any] | None) -> dict[str, Any]:
    """The tool as chat templates know it."""
    described = {} if description is None else {"description": description}
    return {"type": "function", "function": {"name": name, **described, "parameters": schema}}


def _read_grammar(body: MessagesBody) -> Grammar | None:
    """What the answer must match. Where a tool must be called, that is it, whatever the output's format."""
    choice, wanted = body.tool_choice, body.output_config and body.output_config.format
    if choice and _must_call(body):
        tools = [
            DeclaredTool(tool.name, tool.input_schema, f"tools[{place}].input_schema", bool(tool.strict))
            for place, tool in enumerate(body.tools or ())
        ]
        return forced_calls(tools, choice.name if choice.type == "tool" else None, _may_call_several(body))
    return Grammar.json_schema(wanted.schema_, "output_config.format") if wanted else None
