"""What the SDK returns. Plain data, independent of gRPC and protobuf."""

import builtins
from collections.abc import Mapping
from dataclasses import dataclass, field
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
class Classifier:
    """The linear layer on the last hidden states that classifies, of the model or of an adapter."""

    of_tokens: bool
    """It classifies each token by itself, not the input as a whole."""
    labels: tuple[str, ...]


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


class AdapterTier(StrEnum):
    """The fastest place that holds an adapter's weights."""

    DISK = "disk"
    """In the server's adapter directory or download cache."""
    HOST = "host"
    """Checked and partitioned for the ranks, in host memory."""
    DEVICE = "device"
    """In a slot on the device: the next request starts at once."""


class AdapterState(StrEnum):
    """An adapter's state."""

    AVAILABLE = "available"
    """On the server's disk: in its adapter directory or, for a version in the registry, fetched."""
    FETCHING = "fetching"
    """On its way to disk or into host memory."""
    LOADED = "loaded"
    UNLOADING = "unloading"
    """Will be unloaded once the sequences that need it have ended."""
    BROKEN = "broken"
    """In the server's adapter directory, but cannot be served: `reason` says why."""
    REGISTERED = "registered"
    """A version in the server's registry that is neither loaded nor on disk."""
    ALIAS = "alias"
    """A name in the server's registry that stands for `targets`."""
    FAILED = "failed"
    """A version in the server's registry that cannot be fetched or served: `reason` says why."""


@dataclass(frozen=True, slots=True)
class AdapterResidence:
    """An adapter in one of the server's replicas."""

    replica: str
    """The replica's address."""
    tier: AdapterTier
    running_sequences: int
    waiting_sequences: int
    pinned: bool


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that the server has."""

    id: str
    source: str
    """Where it came from, such as "local" or "hub"; "merged" for merged adapters."""
    revision: str
    """The commit that a hub adapter was resolved to."""
    digest: str
    """sha256 over its files; empty while it is only on disk."""
    tier: AdapterTier | None
    """None while it is being fetched."""
    lora_rank: int
    """The largest lora_rank of its layers."""
    size_bytes: int
    """Bytes in host memory, over all ranks."""
    running_sequences: int
    waiting_sequences: int
    state: AdapterState
    requests: int
    """Number of waiting and running requests."""
    last_used: float | None
    """When a request last arrived or ended, in seconds since 1970; None if not since it was loaded."""
    pinned: bool
    """Whether it stays on one replica's device."""
    residences: tuple[AdapterResidence, ...]
    """The replicas that have it in memory."""
    warnings: tuple[str, ...] = ()
    """Possible problems that do not prevent serving, for example that it was made for another model."""
    reason: str = ""
    """Why it is broken, has failed, or is not fetched yet."""
    fetched_bytes: int | None = None
    """How much of its files is on disk while it is fetched; None if that is not known."""
    total_bytes: int | None = None
    """The size of its files while it is fetched; None if that is not known."""
    invocation: str = ""
    """What in a prompt activates it (aLoRA): before the last place of it, the base model computes. Empty: it is always
    active."""
    invocation_token_ids: tuple[int, ...] = ()
    """The same as tokens."""
    classifier: Classifier | None = None
    """Its own, if it was trained to classify; known once it is loaded."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """Of an alias: what it stands for, and the share of sessions that get it, in per cent."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The server's model and its limits."""

    model_id: str
    architecture: str
    dtype: str
    vocab_size: int
    max_model_len: int
    """Limit on prompt and output tokens together."""
    tensor_parallel_size: int
    kv_block_size: int
    """Token positions per block."""
    kv_blocks: int
    max_batch_tokens: int
    max_adapters_on_device: int
    version: str
    has_chat_template: bool
    served_model_names: tuple[str, ...]
    """The model's names on OpenAI's routes: answers have the first, requests may use any."""
    adapter_sources: tuple[str, ...]
    """The names of the adapter sources, in the order in which they are searched."""
    modeling_code: str
    """Whose code computes it: "loraplex", which is faster, or "transformers"."""
    embeds_only: bool
    """The model has no lm head: it answers `embed`, and `classify` if it has a classifier; it refuses `generate`."""
    state_bytes: int
    """Size of what the model keeps for each sequence besides its blocks, on each rank. If it is not 0, no prefixes are
    reused."""
    memory_bytes: int
    """A rank's memory when it started: all of its GPU, or what the host had free."""
    kv_cache_bytes: int
    """What of it the KV cache has."""
    adapter_bytes: int
    """What of it adapters in slots may take; without a GPU, the staged ones."""
    step_bytes: int
    """What of it the largest steps take; 0 without a GPU, where it is not measured."""
    classifier: Classifier | None = None
    """The model's, if it was trained to classify."""
