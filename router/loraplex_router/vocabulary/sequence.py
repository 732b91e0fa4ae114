"""The engine's vocabulary: sequence, chunk and plan. Knows nothing of text, time or transport."""

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, TypeAlias

from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Detail:
    """What is reported beside the tokens."""

    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    prompt_top_logprobs: int = 0
    pool: bool = False  # the mean of the last hidden states, in place of tokens


Alternatives: TypeAlias = tuple[tuple[int, float], ...]  # (token, logprob), best first


class Sample(NamedTuple):
    """A token as the shard answered it."""

    token: int
    logprob: float | None = None
    alternatives: Alternatives = ()


class FinishReason(Enum):
    """The values are those of generation.proto."""

    LENGTH = 1
    END_TOKEN = 2
    STOP_TEXT = 3  # or a stop token that is part of the answer
    CANCELLED = 4


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation. Its progress is three lengths:

    computed <= len(tokens) + in_flight: the positions that plans sent so far put into the KV cache, the tokens known
    here, and the samples that those plans will bring. A sequence has a row and blocks exactly while it is running.
    """

    number: int  # the order of arrival: a lower number is older
    prompt_length: int
    tokens: list[int]  # the prompt, then the output so far
    adapter: Adapter
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)  # resolved
    detail: Detail = field(default_factory=Detail)
    end_token_ids: frozenset[int] = frozenset()
    min_new_tokens: int = 0  # no end token is sampled before, unless the grammar allows nothing else
    grammar: Grammar | None = None
    unwanted_token_ids: frozenset[int] = frozenset()  # sampled only where the grammar allows nothing else
    tenant: str = ""  # whose it is, and that tenant's weight: see fairness.py
    weight: float = 1.0
    cache_salt: str = ""  # it shares prefixes with sequences that have the same one
    traceparent: str = ""  # the trace context that its spans on the shards belong to, if it is traced

    computed: int = 0
    in_flight: int = 0
    row: int | None = None
    blocks: list[int] = field(default_factory=list)
    sent_blocks: int = 0  # how many of them its row's block table has
    block_keys: list[bytes] = field(default_factory=list)  # of the full blocks of `tokens`
    cached_blocks: int = 0  # how many of its blocks the prefix cache knows
    unscored: int = 0  # how many of its last tokens are fast-forward tokens whose logprobs are still to come
    attempts: int = 0  # how often it took a row
    charged: int = 0  # the positions before this one are on its tenant's account
    prefix_hit: int = 0  # prompt tokens that the prefix cache spared at its first start
    finished: bool = False
    losses: int = 0  # replicas in a row that were lost while they computed the same part of it: see suspects.py
    lost_at: range = range(0)  # the positions of that part
    alone_until: int = 0  # the positions before this one are computed in plans without other sequences

    def restart(self, adapter: Adapter) -> None:
        """Begins again on another replica, from the tokens known here, with that replica's copy of the adapter."""
        self.adapter = adapter
        self.computed = self.in_flight = self.sent_blocks = self.cached_blocks = 0
        self.row, self.blocks, self.block_keys = None, [], []
        self.finished = False

    @property
    def suspect(self) -> bool:
        """Whether its next chunk is to be computed without others."""
        return self.computed < self.alone_until

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Positions to compute before the next sample or, after the last one, before all logprobs are known; 0 if the
        last sample, logprob or pooled vector is on its way."""
        known = len(self.tokens)
        if self.detail.pool:
            return known - self.computed
        if known + self.in_flight < self.prompt_length + self.max_new_tokens:  # not full
            return known + self.in_flight - self.computed
        return max(0, known - 1 - self.computed) if self.unscored else 0

    @property
    def full(self) -> bool:
        """Whether all of its samples are known or on their way."""
        return self.output_length + self.in_flight >= self.max_new_tokens


@dataclass(slots=True, eq=False)  # not frozen: one is made per token, and that would take four times as long
class Chunk:
    """What one step computes of a sequence: positions [start, start + length). Never changed."""

    sequence: Sequence
    start: int
    length: int
    samples: bool  # whether a token is sampled from its last position
    new_blocks: tuple[int, ...]  # appended to the row's block table
    attempt: int  # of the sequence's attempts


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One step: its chunks with those of one adapter adjacent, and the sequences that start with it."""

    starts: tuple[Sequence, ...]
    chunks: tuple[Chunk, ...]
    alone: bool = False  # no other plan is to be in flight with it

    @property
    def adapters(self) -> set[Adapter]:
        return {chunk.sequence.adapter for chunk in self.chunks}
