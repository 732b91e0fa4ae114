"""An adapter as the router knows it: what was staged, where it is, and who uses it."""

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from loraplex_protos.generation_pb2 import Classifier
from loraplex_router.vocabulary.chat import AdapterTokenizer

# What is shown where adapters are shown: for the base model, and for adapters that share a place. No adapter can have a
# name in brackets (adapter_names.py), so the usage of one called "base" is its own.
BASE_NAME = "[base]"
OTHER = "[other]"
# On /v1, the base model has these names besides its own: Hugging Face's clients are given a server and no model.
OTHER_BASE_NAMES = ("tgi", "dummy")
NEVER = sys.maxsize  # from no position on


class Nearness(IntEnum):
    """How near an adapter is to a replica's device."""

    ABSENT = 0
    FETCHING = 1
    HOST = 2
    DEVICE = 3


@dataclass(frozen=True, slots=True)
class Invocation:
    """What in a prompt activates an adapter (aLoRA): it acts from the last place of these tokens, after `lag` of
    them."""

    token_ids: tuple[int, ...]
    lag: int = 0

    def find(self, prompt: Sequence[int]) -> int:
        """The first position where the adapter acts; NEVER, if the prompt does not contain the tokens."""
        # Backwards, so that the first place found is the last one: bytes.find takes linear time, unlike rfind.
        wanted, within = (array("I", tokens[::-1]).tobytes() for tokens in (self.token_ids, prompt))
        place = -1
        while (place := within.find(wanted, place + 1)) >= 0:
            behind, rest = divmod(place + len(wanted), array("I").itemsize)
            if not rest:  # a place of whole tokens
                return len(prompt) - behind + self.lag
        return NEVER


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    """An adapter in the host memory of every rank."""

    digest: str
    source: str
    revision: str
    lora_rank: int
    size_bytes: int  # over all ranks
    device_bytes: int = 0  # in a slot, on the rank with the largest part
    tokenizer: AdapterTokenizer = field(default_factory=AdapterTokenizer)
    warnings: tuple[str, ...] = ()  # possible problems that do not prevent serving
    invocation: Invocation | None = None  # None: it is always active
    classifier: Classifier | None = None  # its own, if it has one


@dataclass(frozen=True, slots=True)
class LocalAdapter:
    """A name in the adapter directory."""

    id: str
    fault: str = ""  # why it cannot be served; empty if no fault is visible
    warnings: tuple[str, ...] = ()
    invocation: Invocation | None = None


@dataclass(frozen=True, slots=True)
class Fetch:
    """An adapter on its way from its source to a replica's disk. The first three are as requested."""

    id: str
    source: str
    revision: str
    done: int  # bytes on disk
    total: int  # 0: not known yet
    trouble: str = ""  # why the last try failed, while the next one is waited for


@dataclass(slots=True, eq=False)
class Adapter:
    """One adapter, by content. The base model is the adapter with an empty digest, always ready in slot 0."""

    digest: str
    lora_rank: int = 0
    size_bytes: int = 0
    device_bytes: int = 0  # as in StagedAdapter
    names: set[str] = field(default_factory=set)  # the ids under which it was staged
    tokenizer: AdapterTokenizer = field(default_factory=AdapterTokenizer)
    warnings: tuple[str, ...] = ()  # possible problems that do not prevent serving
    invocation: Invocation | None = None  # None: it is always active
    classifier: Classifier | None = None  # its own, if it has one
    slot: int | None = None  # held from the start of its load to the end of its unloading
    ready: bool = False  # every rank has it in its slot
    waiting: int = 0  # sequences in its queue
    running: int = 0  # sequences with a row
    plans: int = 0  # plans in flight that use its slot
    leases: int = 0  # merges and requests in preparation that need it staged
    turn: int = 0  # sequences it may still start before older ones of adapters without a slot; see the scheduler
    loaded: float = 0.0  # when it was last loaded into a slot, by time.monotonic
    pinned: bool = False  # it keeps its slot, or is the next to get one
    leaving: bool = False  # it will be unloaded: accepts no new sequences
    requests: int = 0  # waiting and running
    last_used: float = 0.0  # when a request last arrived or ended, in seconds since 1970; 0: never

    def acts_from(self, prompt: Sequence[int]) -> int:
        """The first position where it acts; the base model computes those before."""
        return self.invocation.find(prompt) if self.invocation is not None else 0

    @property
    def in_use(self) -> bool:
        return bool(self.running or self.plans)

    @property
    def wanted(self) -> bool:
        """Whether sequences or merges have yet to use it."""
        return bool(self.running or self.waiting or self.leases)

    @property
    def needed(self) -> bool:
        """Whether something would break if it left now: plans may still be in flight for sequences that have ended."""
        on_its_way = self.slot is not None and not self.ready  # to its slot, or out of it
        return bool(self.wanted or self.plans or on_its_way)
