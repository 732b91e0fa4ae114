"""Chats of generation.proto: their messages and tools, and what answers to them consist of."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import FieldViolation, InvalidRequestError, quote
from loraplex_router.api.calls import MAX_TOOLS, TOOL_NAME, AnswerReader, DeclaredTool, forced_calls
from loraplex_router.engine.delta import Delta
from loraplex_router.text.json_limits import parse
from loraplex_router.text.reasoning import Reasoning
from loraplex_router.text.tool_calls import Arguments, ToolCall
from loraplex_router.vocabulary.chat import Chat, Message
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.thoughts import Thoughts
from loraplex_router.vocabulary.violations import Violations


def read_chat(chat: pb.Chat) -> Chat:
    """Raises InvalidRequestError for messages without a role and tools that cannot be described."""
    found = Violations()
    for place, message in enumerate(chat.messages):
        found.check(
            bool(message.role), f"chat.messages[{place}].role", "is empty: send user, assistant or another role"
        )
    found.raise_any()
    return Chat(tuple(map(_read_message, chat.messages)), tuple(_read_tools(chat.tools)))


def read_tool_choice(request: pb.GenerateRequest) -> Grammar | None:
    """The grammar of an answer that must call tools. Raises InvalidRequestError if it cannot be as the choice says."""
    choice, tools, found = request.tool_choice, request.chat.tools, Violations()
    found.check(bool(tools), "tool_choice", "needs a chat with tools")
    named = not choice.name or choice.name in (tool.name for tool in tools)
    found.check(named, "tool_choice.name", f"there is no tool {quote(choice.name)}")
    none = choice.mode == pb.ToolChoice.MODE_NONE
    found.check(not (none and choice.name), "tool_choice.name", "cannot be combined with MODE_NONE")
    forced = _must_call(choice)
    found.check(not (forced and request.HasField("grammar")), "grammar", "cannot be combined with a forced call")
    found.raise_any()
    if not forced:
        return None
    declared = [
        DeclaredTool(tool.name, _read_parameters(place, tool), _parameters(place), tool.strict)
        for place, tool in enumerate(tools)
    ]
    return forced_calls(declared, choice.name or None, several=not choice.single)


def separates(request: pb.GenerateRequest) -> bool:
    """Whether calls and thoughts are separated from an answer's text."""
    return request.HasField("chat") and bool(_callable_tools(request) or request.detail.reasoning)


def create_reader(request: pb.GenerateRequest, thoughts: Thoughts | None) -> AnswerReader | None:
    """What finds calls, and the thoughts that there may be, in an answer; None if nothing is to be found."""
    if not separates(request):
        return None
    choice = request.tool_choice
    return AnswerReader(_callable_tools(request), _must_call(choice), not choice.single, thoughts)


def _callable_tools(request: pb.GenerateRequest) -> set[str]:
    choice = request.tool_choice
    if choice.mode == pb.ToolChoice.MODE_NONE:
        return set()
    return {tool.name for tool in request.chat.tools if choice.name in ("", tool.name)}


@dataclass(slots=True)
class AnswerParts:
    """What the next part of an answer consists of."""

    text: str = ""
    reasoning: str = ""
    calls: list[pb.ToolCallPart] = field(default_factory=list)  # adjacent parts of a call are one


def read_parts(reader: AnswerReader | None, delta: Delta, new_id: Callable[[int], str]) -> AnswerParts:
    """`new_id` makes an id for the call with this number."""
    if reader is None:
        return AnswerParts(delta.text)
    parts = AnswerParts()
    for piece in reader.pieces(delta):
        match piece:
            case Reasoning():
                parts.reasoning += piece.text
            case ToolCall():
                call = pb.ToolCall(id=f"call_{new_id(reader.calls)}", name=piece.name)
                parts.calls.append(pb.ToolCallPart(index=reader.calls - 1, call=call))
            case Arguments():
                if not parts.calls:
                    parts.calls.append(pb.ToolCallPart(index=reader.calls - 1))
                parts.calls[-1].call.arguments += piece.text
            case _:
                parts.text += piece
    return parts


def _read_message(message: pb.ChatMessage) -> Message:
    fields: dict[str, Any] = {}
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    given = {"tool_call_id": message.tool_call_id, "name": message.name, "reasoning_content": message.reasoning}
    fields |= {name: value for name, value in given.items() if value}
    return Message(message.role, message.content, fields)


def _read_tools(tools: Sequence[pb.Tool]) -> Iterator[dict[str, Any]]:
    """As OpenAI's API describes them, which is what templates read."""
    found = Violations()
    found.check(len(tools) <= MAX_TOOLS, "chat.tools", f"at most {MAX_TOOLS}")
    found.check(len({tool.name for tool in tools}) == len(tools), "chat.tools", "must have different names")
    for place, tool in enumerate(tools):
        right = re.fullmatch(TOOL_NAME, tool.name) is not None
        found.check(right, f"chat.tools[{place}].name", "use 1 to 128 characters of A-Z a-z 0-9 . _ -")
    found.raise_any()
    for place, tool in enumerate(tools):
        given = {"description": tool.description or None, "parameters": _read_parameters(place, tool)}
        described = {name: value for name, value in given.items() if value is not None}
        yield {"type": "function", "function": {"name": tool.name, **described}}


def _read_parameters(place: int, tool: pb.Tool) -> dict[str, Any] | None:
    if not tool.parameters:
        return None
    try:
        schema = parse(tool.parameters)
    except ValueError as error:
        raise InvalidRequestError(FieldViolation(_parameters(place), str(error))) from error
    if not isinstance(schema, dict):
        raise InvalidRequestError(FieldViolation(_parameters(place), "must be a JSON object, a schema"))
    return schema


def _parameters(place: int) -> str:
    return f"chat.tools[{place}].parameters"


def _must_call(choice: pb.ToolChoice) -> bool:
    return bool(choice.name) or choice.mode == pb.ToolChoice.MODE_REQUIRED
