"""The engine's vocabulary: sequence, chunk and plan. Independent of text, time and transport."""

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, TypeAlias

from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.sampling import Sampling

WORD_SIZE = 8  # how many numbers take as long to send and read as a list of none


@dataclass(frozen=True, slots=True)
class Detail:
    """What to report in addition to tokens."""

    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    prompt_top_logprobs: int = 0
    pool: bool = False  # a vector of the last hidden states, instead of tokens
    classify: bool = False  # with pool: what the classifier makes of them


Alternatives: TypeAlias = tuple[tuple[int, float], ...]  # (token, logprob), best first


class Sample(NamedTuple):
    """A token as returned by the shard."""

    token: int
    logprob: float | None = None
    alternatives: Alternatives = ()


class Payer(NamedTuple):
    """Whose share of the service a sequence takes."""

    tenant: str
    background: bool = False


class FinishReason(Enum):
    """The values are those of generation.proto."""

    LENGTH = 1
    END_TOKEN = 2
    STOP_TEXT = 3  # also a stop token that is part of the answer
    CANCELLED = 4


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation. Its progress is three lengths:

    computed <= len(tokens) + in_flight: the positions that the plans sent so far put into the KV cache, the tokens
    known here, and the samples that those plans will return. A sequence has a row and blocks exactly while it is
    running.
    """

    number: int  # the order of arrival: a lower number is older
    prompt_length: int
    tokens: list[int]  # the prompt, then the output so far
    adapter: Adapter
    max_new_tokens: int
    acts_from: int = 0  # its adapter computes from this position on; positions before it are the base model's
    sampling: Sampling = field(default_factory=Sampling)  # resolved
    detail: Detail = field(default_factory=Detail)
    end_token_ids: frozenset[int] = frozenset()
    min_new_tokens: int = 0  # until then no end token is sampled, unless the grammar allows nothing else
    grammar: Grammar | None = None
    unwanted_token_ids: frozenset[int] = frozenset()  # sampled only where the grammar allows nothing else
    allowed_token_ids: frozenset[int] = frozenset()  # the only ones that are sampled, likewise; none: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # runs of tokens that are not generated, likewise
    tenant: str = ""  # its tenant and the tenant's weight: see fairness.py
    weight: float = 1.0
    kv_share: float = 1.0  # of the blocks, that its tenant may hold while others want them: see kv_shares.py
    background: bool = False  # it is computed while nothing else is
    cache_salt: str = ""  # it shares cached prefixes with sequences that have the same salt
    traceparent: str = ""  # the trace context of its spans on the shards, if it is traced

    computed: int = 0
    in_flight: int = 0
    row: int | None = None
    blocks: list[int] = field(default_factory=list)
    sent_blocks: int = 0  # number of them in its row's block table
    block_keys: list[bytes] = field(default_factory=list)  # the keys of the full blocks of `tokens`
    cached_blocks: int = 0  # number of its blocks in the prefix cache
    unscored: int = 0  # number of trailing fast-forward tokens not yet returned with logprobs
    attempts: int = 0  # how often it was started in a row
    charged: int = 0  # positions below this one have been charged to its tenant
    gave_way_to: Payer | None = None  # who is charged for those that are computed again: whoever took its blocks
    prefix_hit: int = 0  # prompt tokens found in the prefix cache at its first start
    finished: bool = False
    losses: int = 0  # consecutive replicas lost while computing the same part of it: see suspects.py
    lost_at: range = range(0)  # that part's positions
    alone_until: int = 0  # positions below this one are computed in plans without other sequences

    def restart(self, adapter: Adapter) -> None:
        """Restarts on another replica, from the tokens known here, with that replica's copy of the adapter."""
        self.adapter = adapter
        self.computed = self.in_flight = self.sent_blocks = self.cached_blocks = 0
        self.row, self.blocks, self.block_keys = None, [], []
        self.gave_way_to, self.finished = None, False

    @property
    def payer(self) -> Payer:
        return Payer(self.tenant, self.background)

    @property
    def start_size(self) -> int:
        """How many numbers the shards are sent when it starts in a row."""
        biased = self.sampling.logit_bias or ()
        bad_words = sum(WORD_SIZE + len(word) for word in self.bad_words)
        return len(self.tokens) + len(self.allowed_token_ids) + len(biased) + bad_words

    @property
    def suspect(self) -> bool:
        """Whether its next chunk must be computed alone."""
        return self.computed < self.alone_until

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Number of positions to compute before the next sample or, after the last one, before all logprobs are known;
        0 if the last sample, logprob or pooled vector is in flight."""
        known = len(self.tokens)
        if self.detail.pool:
            return known - self.computed
        if known + self.in_flight < self.prompt_length + self.max_new_tokens:  # not full
            return known + self.in_flight - self.computed
        return max(0, known - 1 - self.computed) if self.unscored else 0

    @property
    def full(self) -> bool:
        """Whether all of its samples are known or in flight."""
        return self.output_length + self.in_flight >= self.max_new_tokens


@dataclass(slots=True, eq=False)  # not frozen: one is created per token, and frozen takes four times as long
class Chunk:
    """The part of a sequence that one step computes: positions [start, start + length). Never changed."""

    sequence: Sequence
    start: int
    length: int
    samples: bool  # whether to sample a token at its last position
    slot: int  # the adapter's that computes it
    new_blocks: tuple[int, ...]  # appended to the row's block table
    attempt: int  # of the sequence's attempts


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One step: its chunks, grouped by adapter, and the sequences that start with it."""

    starts: tuple[Sequence, ...]
    chunks: tuple[Chunk, ...]
    alone: bool = False  # no other plan may be in flight with it

    @property
    def background(self) -> bool:
        return self.chunks[0].sequence.background

    @property
    def tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def adapters(self) -> set[Adapter]:
        return {chunk.sequence.adapter for chunk in self.chunks}
