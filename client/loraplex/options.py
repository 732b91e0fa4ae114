"""What callers give: prompts, adapters, and the options of a generation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypedDict

from loraplex.grammars import Grammar
from loraplex.tools import AnyTool

Message: TypeAlias = Mapping[str, Any]
"""One message of a conversation: {"role": "user", "content": "Hi"}. The model's template determines the roles, such as
"system", "user" and "assistant". The assistant's may have `tool_calls` (ToolCalls, or OpenAI's objects) and
`reasoning`. Results have the role "tool", the call's id as `tool_call_id` and the tool's `name`."""

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


class ParseOptions(TypedDict, total=False):
    """The keyword arguments of `parse` and `stream_parsed`. Options that are absent or None are left to the server."""

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
    background: bool
    """It is computed while its replica has nothing else to compute."""
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
    reasoning: bool
    """Separate what a thinking model thinks from the text of its answer to a conversation; a grammar applies to the
    text alone. `tools`, `parse` and `Conversation` imply it."""
    request_id: str
    """Names the request in `cancel` and in the server's logs; at most 128 characters of A-Z a-z 0-9 . _ : -
    Empty: the server picks one."""


class GenerateOptions(ParseOptions, total=False):
    """The keyword arguments of `generate` and `stream`: those of `parse`, a grammar and tools."""

    grammar: Grammar | None
    """What the whole answer must match: `JsonSchema`, `JsonObject`, `Regex`, `Choice` or `Lark`. It ends where the
    grammar does, with `FinishReason.END_TOKEN`. If max_new_tokens ends it earlier, it is a prefix of a match."""
    tools: Sequence[AnyTool] | None
    """What the answer may call, if the prompt is a conversation: functions, Tools, or tools in OpenAI's form.
    `Conversation` calls the functions."""
    tool_choice: str | None
    """"auto" (the model decides), "none", "required", or the name of the tool that must be called."""
    parallel_tool_calls: bool
    """False: at most one call per answer."""
