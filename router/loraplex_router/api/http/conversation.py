"""Conversations in the bodies of chat completions and of vLLM's tokenization."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator

from loraplex_router.api.calls import MAX_TOOLS, TOOL_NAME
from loraplex_router.api.http.fields import MAX_MESSAGES, STRICT, Items
from loraplex_router.vocabulary.chat import Chat, Content, Message
from loraplex_router.vocabulary.violations import Violations

TEXT_PARTS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}  # type -> its field

SENT = "_sent"  # where a value that is kept is, beside the fields


class AsSent(BaseModel):
    """Validates a value, but keeps the client's own: chat templates see all fields, in the client's order."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, sent: dict[str, Any], check: ModelWrapValidatorHandler[Self]) -> Self:
        found = check(sent)
        found.__dict__[SENT] = sent  # a private attribute takes several times as long as all else: there may be many
        return found

    @property
    def sent(self) -> dict[str, Any]:
        sent: dict[str, Any] = self.__dict__[SENT]
        return sent


class ContentPart(AsSent):
    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(BaseModel):
    name: str
    arguments: str | dict[str, Any] | None = Field(default=None, description="A JSON object, as text or as it is.")


class MessageToolCall(AsSent):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(AsSent):
    """Chat templates see all fields, including others, for example `reasoning_content`."""

    role: str
    content: str | Items[ContentPart] | None = None
    name: str | None = None
    tool_calls: Items[MessageToolCall] | None = None
    function_call: CalledFunction | None = Field(default=None, description="OpenAI's older form of one call.")
    tool_call_id: str | None = None


class Function(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=f"^{TOOL_NAME}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(default=None, description=STRICT)


class Tool(AsSent):
    type: Literal["function"]
    function: Function


class Conversation(BaseModel):
    """The input of a chat template."""

    messages: Items[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: Items[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    documents: Items[dict[str, Any]] | None = Field(default=None, description="For chat templates that read them.")
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = Field(
        default=None, description="For chat templates that read it, or enable_thinking: false for none, else true."
    )
    add_generation_prompt: bool | None = Field(default=None, description="false: the prompt does not begin an answer.")
    chat_template: str | None = Field(default=None, description="Not supported: refused unless empty.")
    continue_final_message: bool | None = Field(
        default=None, description="true: the answer continues the last message, which must be the assistant's."
    )


def read_conversation(body: Conversation, found: Violations) -> Chat:
    """The conversation with all given tools."""
    found.check(not body.chat_template, "chat_template", "is not supported: leave it out")
    continued = bool(body.continue_final_message)
    both = continued and bool(body.add_generation_prompt)
    found.check(not both, "continue_final_message", "cannot be used with add_generation_prompt: set that to false")
    return Chat(
        messages=tuple(_read_message(message, place, found) for place, message in enumerate(body.messages)),
        tools=tuple(tool.sent for tool in body.tools or ()),
        documents=body.documents,
        variables=_variables(body),
        generation_prompt=body.add_generation_prompt is not False and not continued,
        continue_final_message=continued,
    )


def _variables(body: Conversation) -> dict[str, Any]:
    """The reasoning effort as vLLM passes it to templates; `chat_template_kwargs` take precedence."""
    effort = body.reasoning_effort
    said = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    return said | (body.chat_template_kwargs or {})


def _read_message(message: ChatMessage, place: int, found: Violations) -> Message:
    """The message with unchanged fields: the renderer finds out which form the template needs."""
    fields = {name: value for name, value in message.sent.items() if name not in ("role", "content", "tool_calls")}
    if "reasoning" in fields:  # answers have it under both names, and templates read the older one
        fields.setdefault("reasoning_content", fields["reasoning"])
    if message.tool_calls:
        fields["tool_calls"] = [{"type": call.type, **call.sent} for call in message.tool_calls]
    role, function = message.role, fields.pop("function_call", None)
    if function is not None:
        fields.setdefault("tool_calls", [{"id": f"call_{place}", "type": "function", "function": function}])
    if role == "function":  # it follows its call
        role, fields["tool_call_id"] = "tool", f"call_{place - 1}"
    content: Content = message.content if isinstance(message.content, str) else None
    if isinstance(message.content, list):
        for at, part in enumerate(message.content):
            if _text_of(part) is None:
                field = TEXT_PARTS.get(part.type)
                wrong = f"has no {field}" if field else f"is of type {part.type[:100]!r}: the model reads text"
                found.check(False, f"messages[{place}][content][{at}]", wrong)
        content = [_read_part(part) for part in message.content]
    return Message(role, content, fields)


def _read_part(part: ContentPart) -> dict[str, Any]:
    return part.sent if part.type == "text" else {"type": "text", "text": _text_of(part)}


def _text_of(part: ContentPart) -> str | None:
    field = TEXT_PARTS.get(part.type)
    text: str | None = getattr(part, field) if field else None
    return text
