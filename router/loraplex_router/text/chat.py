"""Chat templates: the Jinja2 programs that models bring along to turn messages into a prompt."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jinja2
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.text.tool_prompt import describe_tools

FIELD = "chat.messages"


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str
    fields: Mapping[str, Any] = field(default_factory=dict)  # what else it has: tool_calls, tool_call_id, name


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, to be continued unless generation_prompt is false."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()  # what the model may call, as OpenAI's API describes it
    variables: Mapping[str, Any] = field(default_factory=dict)  # for the template, for example enable_thinking
    generation_prompt: bool = True  # the text ends with the beginning of the assistant's next message


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as text, which has the special tokens that it needs."""

    text: str


class ChatTemplate:
    """A compiled template, run in a sandbox with what `transformers` offers its templates.

    Raises jinja2.TemplateError if `source` is not a template.
    """

    def __init__(self, source: str, bos_token: str, eos_token: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        self._template = environment.from_string(source)
        self._knows_tools = "tools" in find_undeclared_variables(environment.parse(source))
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    @staticmethod
    def require(template: "ChatTemplate | None") -> "ChatTemplate":
        if template is None:
            raise _invalid("the model has no chat template: send a text prompt")
        return template

    def render(self, chat: Chat) -> str:
        """The prompt. A template that knows nothing of tools gets them described in the system message.

        Raises InvalidRequestError if the template refuses the messages, for example for the order of their roles.
        """
        rows = [{"role": message.role, "content": message.content, **message.fields} for message in chat.messages]
        if not self._knows_tools:
            rows = describe_tools(rows, chat.tools)
        given = {**chat.variables, "messages": rows, "tools": list(chat.tools) or None, **self._tokens}
        try:
            return self._template.render({**given, "add_generation_prompt": chat.generation_prompt})
        except Exception as error:  # it is a program
            raise _invalid(f"the chat template refuses them: {str(error)[:500]}") from error


def _invalid(description: str) -> InvalidRequestError:
    return InvalidRequestError(FieldViolation(FIELD, description))


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # Jinja's own filter escapes for HTML


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
