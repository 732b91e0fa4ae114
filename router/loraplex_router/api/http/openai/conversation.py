"""The conversations in the bodies of chat completions and of vLLM's tokenization."""

from typing import Any

from loraplex_router.api.http.openai.schema import ChatMessage, ContentPart, Conversation
from loraplex_router.json_limits import parse
from loraplex_router.request import Violations
from loraplex_router.text.chat import Chat, Message

ROLES = {"developer": "system"}  # OpenAI's new word for it, which no template knows


def read_conversation(body: Conversation, found: Violations) -> Chat:
    """With all tools that are given."""
    for name in ("chat_template", "continue_final_message"):
        found.check(not getattr(body, name), name, "is not supported: leave it out")
    return Chat(
        messages=tuple(_read_message(message, place, found) for place, message in enumerate(body.messages)),
        tools=tuple(tool.model_dump(exclude_none=True) for tool in body.tools or ()),
        variables=body.chat_template_kwargs or {},
        generation_prompt=body.add_generation_prompt is not False,
    )


def _read_message(message: ChatMessage, place: int, found: Violations) -> Message:
    parts = message.content if isinstance(message.content, list) else []
    for at, part in enumerate(parts):
        name = f"messages[{place}][content][{at}]"
        found.check(_text_of(part) is not None, name, 'must be of type "text": the model reads text')
    text = message.content if isinstance(message.content, str) else "".join(_text_of(part) or "" for part in parts)
    fields: dict[str, Any] = {}
    if message.tool_calls:
        calls = [call.model_dump(exclude_none=True) for call in message.tool_calls]
        for call in calls:
            call["function"]["arguments"] = _read_arguments(call["function"]["arguments"])
        fields["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if value := getattr(message, name):
            fields[name] = value
    return Message(ROLES.get(message.role, message.role), text, fields)


def _text_of(part: ContentPart) -> str | None:
    return {"text": part.text, "refusal": part.refusal}.get(part.type)


def _read_arguments(arguments: str) -> Any:
    """As templates want those of earlier calls: the object itself, where the text is one."""
    try:
        return parse(arguments)
    except ValueError:
        return arguments
