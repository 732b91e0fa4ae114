"""What callers give and get. Plain data: knows nothing of gRPC or protobuf."""

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias, TypedDict

from loraplex.grammars import Grammar

Message: TypeAlias = Mapping[str, str]
"""One message of a conversation: {"role": "user", "content": "Hi"}. The roles are those that the model's template
knows, for example "system", "user" and "assistant"."""

Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""A text (tokenized with the special tokens that the tokenizer adds), token ids (taken as they are), or a
conversation (rendered with the model's own chat template)."""


@dataclass(frozen=True, slots=True)
class AdapterReference:
    """Where an adapter comes from."""

    id: str
    """A name in the server's adapter directory (local) or a repository id such as "org/name" (hub)."""
    source: str = ""
    """One of ModelInfo.adapter_sources, as "local" or "hub". Empty: the first of them that has the id."""
    revision: str = ""
    """Branch, tag or commit of a hub repository. Empty: the default branch."""
    token: str = field(default="", repr=False)
    """Passed to the hub for a private repository."""


@dataclass(frozen=True, slots=True)
class MergedAdapters:
    """Several adapters of the same lora_rank, merged into one as PEFT's `add_weighted_adapter` does."""

    adapters: Sequence[str | AdapterReference]
    """At most 16."""
    weights: Sequence[float] = ()
    """One per adapter, negative ones subtract. Empty: 1 each."""
    strategy: str = "linear"
    """"linear", "ties", "dare_linear", "dare_ties" or "magnitude_prune"."""
    density: float = 1.0
    """The fraction of each adapter's values that all strategies but linear keep; above 0 and at most 1."""
    majority_sign_method: str = "total"
    """How ties and dare_ties elect a value's sign: "total" (by magnitude) or "frequency"."""


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of `generate` and `stream`. What is left out, or None, is left to the server."""

    adapter: str | AdapterReference | MergedAdapters | None
    """Its id, or where it comes from, or several to be merged. None: the base model."""
    max_new_tokens: int | None
    """At least 1. None: as many as the model's context has room for."""
    stop: str | Sequence[str]
    """Ends at the first of these texts, which is not part of the answer. At most 16, of at most 256 characters."""
    stop_token_ids: Sequence[int]
    """Ends at any of these tokens, beside the model's own end tokens."""
    ignore_eos: bool
    """Goes on over the model's end tokens. With a grammar: it ends where the grammar allows nothing more."""
    min_new_tokens: int
    """The least tokens to generate: before, no end token and none of stop_token_ids is chosen, unless a grammar allows
    nothing else."""
    grammar: Grammar | None
    """What the whole answer must match: `JsonSchema`, `JsonObject`, `Regex`, `Choice` or `Lark`. It ends where the
    grammar does, with `FinishReason.END_TOKEN`; one that is cut by max_new_tokens is the beginning of a match."""
    temperature: float | None
    """0 is greedy. None: 1 if any of top_k, top_p, typical_p, min_p or top_n_sigma is given, else 0."""
    top_k: int | None
    """Keep the k most likely tokens; at least 1."""
    top_p: float | None
    """Keep the most likely tokens whose probabilities add up to p; in (0, 1]."""
    typical_p: float | None
    """Keep the tokens of typical surprise (arXiv 2202.00666) whose probabilities add up to p; in (0, 1]."""
    min_p: float | None
    """Drop tokens less likely than min_p times the most likely one; in [0, 1]."""
    top_n_sigma: float | None
    """Keep the tokens whose logits are at most this many standard deviations below the largest one; above 0."""
    repetition_penalty: float | None
    """Divide positive and multiply negative logits of tokens in prompt and output (arXiv 1909.05858); above 0."""
    frequency_penalty: float | None
    """Subtract this times a token's count in the output; in [-2, 2]."""
    presence_penalty: float | None
    """Subtract this from each token that is in the output; in [-2, 2]."""
    seed: int | None
    """The same seed gives the same tokens. None: random."""
    logit_bias: Mapping[int, float] | None
    """What to add to the logits of tokens, by their ids: from -100, which all but bans a token, to 100."""
    cache_salt: str
    """Known prefixes are reused among requests with the same salt alone. At most 512 characters."""
    n: int
    """How many sequences to generate from the prompt. With a seed, sequence i uses seed + i."""
    logprobs: bool
    """Report the log probability of each generated token, before temperature and penalties."""
    top_logprobs: int
    """Report this many of the most likely alternatives for each generated token, at most 32. Implies logprobs."""
    prompt_logprobs: bool
    """Report the log probability of each prompt token given those before it."""
    prompt_top_logprobs: int
    """Report this many of the most likely alternatives for each prompt token but the first, at most 32. Implies
    prompt_logprobs."""
    request_id: str
    """Names the request in `cancel` and in the server's logs; at most 128 characters of A-Z a-z 0-9 . _ : -
    Empty: the server picks one."""


class FinishReason(StrEnum):
    """Why a sequence ended."""

    LENGTH = "length"
    """max_new_tokens or the model's context was used up."""
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
    """What it is within a text; a part of a character is shown as U+FFFD."""
    logprob: float | None
    """None unless asked for."""
    alternatives: tuple[TokenLogprob, ...]
    """The most likely tokens, best first, if asked for."""
    bytes: builtins.bytes
    """The same as `text`, parts of characters included: those of all tokens are the text's."""


@dataclass(frozen=True, slots=True)
class PromptToken:
    id: int
    text: str
    logprob: float | None
    """None for the first token, which nothing precedes."""
    alternatives: tuple[TokenLogprob, ...]
    """The most likely tokens in its place, best first, if asked for."""
    bytes: builtins.bytes
    """As a Token's."""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt's tokens, how many were found in the prefix cache."""
    generated_tokens: int
    """Every token that was sampled for the answer, those of a stop text included."""


@dataclass(frozen=True, slots=True)
class GeneratedSequence:
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    usage: Usage
    seed: int | None
    """The seed that repeats this sequence; None if it was not sampled."""


@dataclass(frozen=True, slots=True)
class Generation:
    """The answer to `generate`."""

    request_id: str
    sequences: tuple[GeneratedSequence, ...]
    prompt: tuple[PromptToken, ...]
    """Empty unless prompt_logprobs or prompt_top_logprobs asked for it."""
    adapter_digest: str
    """Of the adapter that answered; empty for the base model."""

    @property
    def text(self) -> str:
        """The text of the first sequence."""
        return self.sequences[0].text


@dataclass(frozen=True, slots=True)
class StreamPiece:
    """What `stream` yields: some more of one sequence."""

    request_id: str
    index: int
    """Which of the n sequences this is about."""
    text: str
    """What follows the pieces before; whole characters only. May be empty."""
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None
    """Set on the last piece of a sequence, as are usage and seed (None if it was not sampled)."""
    usage: Usage | None
    seed: int | None
    prompt: tuple[PromptToken, ...]
    """On the first piece of sequence 0, if prompt_logprobs or prompt_top_logprobs asked for it."""
    adapter_digest: str
    """On the first piece of a sequence: of the adapter that answers; empty for the base model."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """The mean of the model's last hidden states, after its final norm, over all tokens of an input."""

    values: tuple[float, ...]
    """As many as the model's hidden size; their squares add up to 1."""
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A token of a given text or conversation, and the characters [start, stop) that became it."""

    id: int
    text: str
    start: int
    stop: int


class AdapterTier(StrEnum):
    """The fastest place that holds an adapter's weights."""

    DISK = "disk"
    """In the server's adapter directory or download cache."""
    HOST = "host"
    """Checked and cut for the ranks, in host memory."""
    DEVICE = "device"
    """In a slot on the device: the next request starts at once."""


class AdapterState(StrEnum):
    """What happens to an adapter."""

    AVAILABLE = "available"
    """It lies in the server's adapter directory."""
    FETCHING = "fetching"
    """It is on its way into host memory."""
    LOADED = "loaded"
    UNLOADING = "unloading"
    """It is unloaded once the sequences that need it have ended."""
    BROKEN = "broken"
    """It lies in the server's adapter directory, but cannot be served: `reason` says why."""


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
    """Where it came from, as "local" or "hub"; "merged" for merged ones."""
    revision: str
    """The commit that a hub adapter was resolved to."""
    digest: str
    """sha256 over its files; empty while it is only on disk."""
    tier: AdapterTier | None
    """None while it is being fetched."""
    lora_rank: int
    """The largest among its layers."""
    size_bytes: int
    """In host memory, over all ranks."""
    running_sequences: int
    waiting_sequences: int
    state: AdapterState
    requests: int
    """That wait or run."""
    last_used: float | None
    """When a request last came or ended, in seconds since 1970; None if not since it was loaded."""
    pinned: bool
    """It stays on the device of one replica."""
    residences: tuple[AdapterResidence, ...]
    """The replicas that have it in memory."""
    warnings: tuple[str, ...] = ()
    """What may be wrong with it though it is served: it was made for another model, for example."""
    reason: str = ""
    """Why it is broken."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that the server runs, and how."""

    model_id: str
    architecture: str
    dtype: str
    vocab_size: int
    max_model_len: int
    """In tokens, prompt and output together."""
    tensor_parallel_size: int
    kv_block_size: int
    """Token positions per block."""
    kv_blocks: int
    max_batch_tokens: int
    max_adapters_on_device: int
    version: str
    has_chat_template: bool
    served_model_names: tuple[str, ...]
    """What OpenAI's routes call it: the first in answers, any in requests."""
    adapter_sources: tuple[str, ...]
    """Where adapters come from, in the order in which they are asked."""
    modeling_code: str
    """Whose code computes it: "loraplex", which is faster, or "transformers"."""
