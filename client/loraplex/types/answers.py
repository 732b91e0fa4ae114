"""Answers of the model."""

import builtins
from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a sequence ended."""

    LENGTH = "length"
    """max_new_tokens or the model's context length was reached."""
    END_TOKEN = "end_token"
    """The model's end token, or one of stop_token_ids."""
    STOP_TEXT = "stop_text"
    """One of the stop texts."""
    CANCELLED = "cancelled"
    """`cancel` named the request."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    id: int
    text: str
    logprob: float
    bytes: builtins.bytes
    """As a Token's."""


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token. An answer's text is not the concatenation of its tokens' texts."""

    id: int
    text: str
    """The token as text; a part of a character is shown as U+FFFD."""
    logprob: float | None
    """None unless requested."""
    alternatives: tuple[TokenLogprob, ...]
    """The most likely tokens, best first, if requested."""
    bytes: builtins.bytes
    """The token's bytes, which may be part of a character. All tokens' bytes together are the text's."""


@dataclass(frozen=True, slots=True)
class PromptToken:
    id: int
    text: str
    logprob: float | None
    """None for the first token."""
    alternatives: tuple[TokenLogprob, ...]
    """The most likely tokens at this position, best first, if requested."""
    bytes: builtins.bytes
    """As a Token's."""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int
    """Number of prompt tokens found in the prefix cache."""
    generated_tokens: int
    """Number of tokens generated for the answer, including those of a stop text."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the model asks for."""

    id: str
    """The message with the result refers to it, as its tool_call_id."""
    name: str
    arguments: str
    """A JSON object, as the model wrote it: it may be incomplete or not what the tool takes."""


@dataclass(frozen=True, slots=True)
class ToolCallPart:
    """What arrives of a call in one piece of a stream."""

    index: int
    """Which of the sequence's calls it belongs to."""
    id: str
    """Set in a call's first part, as is the name."""
    name: str
    arguments: str
    """The next part of the arguments."""


@dataclass(frozen=True, slots=True)
class GeneratedSequence:
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    usage: Usage
    seed: int | None
    """The seed that reproduces this sequence; None if it was not sampled."""
    adapter: str = ""
    """The adapter that answered, as the request named it; empty for the base model."""
    adapter_digest: str = ""
    adapter_version: str = ""
    """The version that a name or an alias in the server's registry led to, as "name@version"."""
    reasoning: str = ""
    """What a thinking model thought before the text, if `reasoning` or `tools` asked for it."""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """The answer to `generate`."""

    request_id: str
    sequences: tuple[GeneratedSequence, ...]
    prompt: tuple[PromptToken, ...]
    """Empty unless prompt_logprobs or prompt_top_logprobs asked for it."""
    adapter_digest: str
    """The digest of the adapter that answered, of several the first one's; empty for the base model."""
    warnings: tuple[str, ...] = ()
    """What the caller should know, for example that the prompt does not contain what activates the adapter."""
    adapter_version: str = ""
    """Of several adapters, the first one's."""

    @property
    def text(self) -> str:
        """The text of the first sequence."""
        return self.sequences[0].text


@dataclass(frozen=True, slots=True)
class StreamPiece:
    """What `stream` yields: the next piece of one sequence."""

    request_id: str
    index: int
    """Which of the n sequences this piece belongs to."""
    text: str
    """The next part of the text, in whole characters. May be empty."""
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None
    """Set on the last piece of a sequence, as are usage and seed (None if it was not sampled)."""
    usage: Usage | None
    seed: int | None
    prompt: tuple[PromptToken, ...]
    """On the first piece of sequence 0, if prompt_logprobs or prompt_top_logprobs asked for it."""
    adapter_digest: str
    """On the first piece of a sequence: the digest of the adapter that answers; empty for the base model."""
    warnings: tuple[str, ...] = ()
    """On the first piece of a sequence: what the caller should know."""
    adapter: str = ""
    """The adapter that answers, as the request named it; empty for the base model."""
    adapter_version: str = ""
    """On the first piece of a sequence: as in GeneratedSequence."""
    reasoning: str = ""
    """The next part of what a thinking model thinks, if `reasoning` or `tools` asked for it."""
    tool_calls: tuple[ToolCallPart, ...] = ()


@dataclass(frozen=True, slots=True)
class Embedding:
    """The mean of the model's last hidden states, after its final norm, over all tokens of an input."""

    values: tuple[float, ...]
    """One value per hidden dimension of the model; their squares add up to 1."""
    prompt_tokens: int
    warnings: tuple[str, ...] = ()
    """What the caller should know, as a Generation's."""
    adapter_digest: str = ""
    adapter_version: str = ""


@dataclass(frozen=True, slots=True)
class ClassifiedToken:
    """A token with the labels that a classifier of tokens gives it. In an input that is a text, it stands for the
    characters [start, stop)."""

    id: int
    text: str
    start: int
    stop: int
    label: str
    """The one with the highest score."""
    scores: dict[str, float]
    """By label."""


@dataclass(frozen=True, slots=True)
class Classification:
    """What a classifier makes of an input."""

    label: str
    """The one with the highest score; empty if tokens are classified."""
    scores: dict[str, float]
    """By label."""
    tokens: tuple[ClassifiedToken, ...]
    """All tokens of the input, if these are classified."""
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A token of a text or conversation, with its characters [start, stop)."""

    id: int
    text: str
    start: int
    stop: int
