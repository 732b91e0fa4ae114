"""The conversations in the bodies of chat completions and of vLLM's tokenization."""

from typing import Any

from loraplex_router.api.http.openai.schema import ChatMessage, ContentPart, Conversation
from loraplex_router.vocabulary.chat import Chat, Content, Message
from loraplex_router.vocabulary.request import Violations

TEXT_PARTS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}  # type -> its field


def read_conversation(body: Conversation, found: Violations) -> Chat:
    """With all tools that are given."""
    found.check(not body.chat_template, "chat_template", "is not supported: leave it out")
    continued = bool(body.continue_final_message)
    both = continued and bool(body.add_generation_prompt)
    found.check(not both, "continue_final_message", "has no meaning with add_generation_prompt: set that to false")
    return Chat(
        messages=tuple(_read_message(message, place, found) for place, message in enumerate(body.messages)),
        tools=tuple(tool.sent for tool in body.tools or ()),
        documents=body.documents,
        variables=_variables(body),
        generation_prompt=body.add_generation_prompt is not False and not continued,
        continue_final_message=continued,
    )


def _variables(body: Conversation) -> dict[str, Any]:
    """How much is thought is said to templates as vLLM says it; what is written to the template itself counts more."""
    effort = body.reasoning_effort
    said = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    return said | (body.chat_template_kwargs or {})


def _read_message(message: ChatMessage, place: int, found: Violations) -> Message:
    """Its fields are left as they are: what a template makes of them is found out where it is rendered."""
    fields = {name: value for name, value in message.sent.items() if name not in ("role", "content", "tool_calls")}
    if message.tool_calls:
        fields["tool_calls"] = [{"type": call.type, **call.sent} for call in message.tool_calls]
    content: Content = message.content if isinstance(message.content, str) else None
    if isinstance(message.content, list):
        for at, part in enumerate(message.content):
            name, field = f"messages[{place}][content][{at}]", TEXT_PARTS.get(part.type)
            found.check(field is not None, name, f"is of type {part.type[:100]!r}: the model reads text")
            found.check(field is None or _text_of(part) is not None, name, f"has no {field}")
        content = [_read_part(part) for part in message.content]
    return Message(message.role, content, fields)


def _read_part(part: ContentPart) -> dict[str, Any]:
    return part.sent if part.type == "text" else {"type": "text", "text": _text_of(part)}


def _text_of(part: ContentPart) -> str | None:
    text: str | None = getattr(part, TEXT_PARTS.get(part.type, ""), None)
    return text
