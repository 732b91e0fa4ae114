"""The SDK's types. Plain data, independent of gRPC and protobuf."""

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias, TypedDict

from loraplex.grammars import Grammar

Message: TypeAlias = Mapping[str, str]
"""One message of a conversation: {"role": "user", "content": "Hi"}. The model's template determines the roles, such as
"system", "user" and "assistant"."""

Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""A text (tokenized with the tokenizer's special tokens), token ids (used as they are), or a conversation (rendered
with the model's chat template)."""


@dataclass(frozen=True, slots=True)
class AdapterReference:
    """Where an adapter comes from."""

    id: str
    """A name in the server's registry, or "name@version" for one version of it; a name in the server's adapter
    directory (local) or a repository id such as "org/name" (hub)."""
    source: str = ""
    """One of ModelInfo.adapter_sources, such as "local" or "hub". Empty: the first source that has the id."""
    revision: str = ""
    """Branch, tag or commit of a hub repository. Empty: the default branch."""
    token: str = field(default="", repr=False)
    """Sent to the hub, for private repositories."""


@dataclass(frozen=True, slots=True)
class MergedAdapters:
    """Several adapters of the same lora_rank, merged into one as PEFT's `add_weighted_adapter` does."""

    adapters: Sequence[str | AdapterReference]
    """At most 16."""
    weights: Sequence[float] = ()
    """One per adapter; negative weights subtract. Empty: 1 each."""
    strategy: str = "linear"
    """"linear", "ties", "dare_linear", "dare_ties" or "magnitude_prune"."""
    density: float = 1.0
    """The fraction of each adapter's values that strategies other than linear keep; above 0 and at most 1."""
    majority_sign_method: str = "total"
    """How ties and dare_ties elect a value's sign: "total" (by magnitude) or "frequency"."""


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of `generate` and `stream`. Options that are absent or None are left to the server."""

    adapter: str | AdapterReference | MergedAdapters | None
    """An adapter's id, an AdapterReference, or several adapters to merge. None: the base model."""
    adapters: Sequence[str | AdapterReference | None] | None
    """Several adapters that all answer, in place of `adapter`: n sequences of the first, then n of the second, and so
    on; None is the base model. At most 16, and 64 sequences together."""
    max_new_tokens: int | None
    """At least 1. None: as many as fit the model's context."""
    stop: str | Sequence[str]
    """The sequence ends at the first of these texts, which is not part of the answer. At most 16, of at most 256
    characters."""
    stop_token_ids: Sequence[int]
    """The sequence ends at any of these tokens, in addition to the model's own end tokens."""
    ignore_eos: bool
    """Continue past the model's end tokens. With a grammar, the answer ends where the grammar allows nothing more."""
    min_new_tokens: int
    """Minimum number of tokens to generate: end tokens and stop_token_ids are not sampled before, unless a grammar
    allows nothing else."""
    grammar: Grammar | None
    """What the whole answer must match: `JsonSchema`, `JsonObject`, `Regex`, `Choice` or `Lark`. It ends where the
    grammar does, with `FinishReason.END_TOKEN`. If max_new_tokens ends it earlier, it is a prefix of a match."""
    temperature: float | None
    """0 is greedy. None: 1 if any of top_k, top_p, typical_p, min_p or top_n_sigma is given, else 0."""
    top_k: int | None
    """Keep the k most likely tokens; at least 1."""
    top_p: float | None
    """Keep the most likely tokens whose probabilities add up to p; in (0, 1]."""
    typical_p: float | None
    """Keep the most typical tokens (arXiv 2202.00666) whose probabilities add up to p; in (0, 1]."""
    min_p: float | None
    """Drop tokens less likely than min_p times the most likely one; in [0, 1]."""
    top_n_sigma: float | None
    """Keep the tokens whose logits are at most this many standard deviations below the largest one; above 0."""
    repetition_penalty: float | None
    """Divide positive and multiply negative logits of tokens in the prompt or output by this (arXiv 1909.05858); above
    0."""
    frequency_penalty: float | None
    """Subtract this times a token's count in the output; in [-2, 2]."""
    presence_penalty: float | None
    """Subtract this from the logit of each token in the output; in [-2, 2]."""
    seed: int | None
    """The same seed gives the same tokens. None: random."""
    logit_bias: Mapping[int, float] | None
    """Added to tokens' logits, by token id: from -100, which practically bans a token, to 100."""
    session: str
    """Requests of the same session get the same adapter from an alias with weights. At most 512 characters."""
    cache_salt: str
    """Cached prefixes are shared only by requests with the same salt. At most 512 characters."""
    n: int
    """Number of sequences to generate from the prompt. With a seed, sequence i uses seed + i."""
    logprobs: bool
    """Report the log probability of each generated token, before temperature and penalties."""
    top_logprobs: int
    """Number of most likely alternatives to report per generated token, at most 32. Implies logprobs."""
    prompt_logprobs: bool
    """Report the log probability of each prompt token given those before it."""
    prompt_top_logprobs: int
    """Number of most likely alternatives to report per prompt token except the first, at most 32. Implies
    prompt_logprobs."""
    request_id: str
    """Names the request in `cancel` and in the server's logs; at most 128 characters of A-Z a-z 0-9 . _ : -
    Empty: the server picks one."""


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
    """In the server's adapter directory."""
    FETCHING = "fetching"
    """Being loaded into host memory."""
    LOADED = "loaded"
    UNLOADING = "unloading"
    """Will be unloaded once the sequences that need it have ended."""
    BROKEN = "broken"
    """In the server's adapter directory, but cannot be served: `reason` says why."""
    REGISTERED = "registered"
    """A version in the server's registry that is not loaded."""
    ALIAS = "alias"
    """A name in the server's registry that stands for `targets`."""


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
    """Why it is broken."""
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
    classifier: Classifier | None = None
    """The model's, if it was trained to classify."""
