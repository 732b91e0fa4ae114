"""Conversations, and the chat templates that turn them into prompts. renderer.py renders them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from loraplex_protos.errors import AdapterInvalidError, FieldViolation, InvalidRequestError

FIELD = "chat.messages"
QUERY, DOCUMENT = "query", "document"  # roles in templates for pairs

Content: TypeAlias = str | Sequence[Mapping[str, Any]] | None  # a text, a list of parts {"type": "text", ...}, or none


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: Content = None
    fields: Mapping[str, Any] = field(default_factory=dict)  # all other fields, as the client sent them


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation. Its text ends with the beginning of the assistant's next message, unless disabled."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()  # what the model may call, as OpenAI's API describes it
    documents: Sequence[Mapping[str, Any]] | None = None  # for templates that use them
    variables: Mapping[str, Any] = field(default_factory=dict)  # for the template, such as enable_thinking
    generation_prompt: bool = True
    continue_final_message: bool = False  # the text ends with the last message, to be continued


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as text, including its special tokens."""

    text: str
    turn_end: str = ""  # what the template writes after an answer


@dataclass(frozen=True, slots=True)
class TextPair:
    """A query and a document, to be judged together."""

    query: str
    document: str
    max_query: int = 0  # tokens that are kept of the query, from its beginning; 0: all
    max_document: int = 0
    joined: bool = False  # one text directly behind the other, else as the tokenizer joins pairs

    def as_chat(self) -> Chat:
        """For chat templates that are made for pairs."""
        return Chat((Message(QUERY, self.query), Message(DOCUMENT, self.document)), generation_prompt=False)


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """A tokenizer's chat templates and special tokens."""

    by_name: Mapping[str, str] = field(default_factory=dict)  # Jinja2: "default", and others such as "tool_use"
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # used by templates: "eos_token" and the like

    @property
    def takes_pairs(self) -> bool:
        """Whether the default template is made for a query and a document: it names both roles, as vLLM's do."""
        template = self.by_name.get("default", "")
        return all(f"'{role}'" in template or f'"{role}"' in template for role in (QUERY, DOCUMENT))

    def choose(self, has_tools: bool) -> str:
        """The template for a conversation, as transformers chooses it. Raises InvalidRequestError if there is none."""
        name = "tool_use" if has_tools and "tool_use" in self.by_name else "default"
        if name not in self.by_name:
            others = f", only {', '.join(sorted(self.by_name))}" if self.by_name else ""
            description = f"the model has no chat template{others}: send a text prompt"
            raise InvalidRequestError(FieldViolation(FIELD, description))
        return self.by_name[name]


@dataclass(frozen=True, slots=True)
class AdapterTokenizer:
    """An adapter's own text settings."""

    templates: ChatTemplates = field(default_factory=ChatTemplates)  # an empty special token means none
    end_token_ids: tuple[int, ...] = ()  # in addition to the model's
    error: str = ""  # why the templates cannot be parsed, if so
    json: bytes = b""  # a tokenizer.json with tokens of its own; empty: its tokens come from the model's tokenizer
    vocab_size: int = 0  # how many tokens it has; 0: as many as the model
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)  # for parameters that a request leaves open

    @property
    def differs(self) -> bool:
        """Whether it has other tokens than the model."""
        return bool(self.json or self.vocab_size)

    def over(self, model: ChatTemplates) -> ChatTemplates:
        """The templates for conversations with the adapter. Raises AdapterInvalidError if they cannot be parsed."""
        if self.error:
            raise AdapterInvalidError(f"the adapter's chat template cannot be parsed: {self.error}")
        by_name = self.templates.by_name if "default" in self.templates.by_name else model.by_name
        named = {**model.special_tokens, **self.templates.special_tokens}
        return ChatTemplates(by_name, {name: token for name, token in named.items() if token})
