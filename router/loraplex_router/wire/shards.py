"""The seam to a replica's shards, which are driven as if they were one."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from loraplex_protos import shard_pb2 as pb
from loraplex_router.vocabulary.adapter import LocalAdapter, StagedAdapter
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.references import AdapterReference, MergedReference


class ShardsObserver(Protocol):
    """Whoever watches the calls of one replica's shards."""

    def rank_latency(self, rank: int, seconds: float) -> None:
        """What a step took beyond the rank's own time."""

    def loading(self, tier: str) -> AbstractContextManager[None]:
        """Within it an adapter is brought to a tier: host or device."""

    def evicted(self, tier: str) -> None:
        """An adapter has left a tier."""


class Steps(Protocol):
    """Plans and their results. Every call raises LoraplexError, as those below do."""

    async def send(self, plan: pb.StepRequest) -> None: ...
    async def receive(self) -> pb.StepResponse: ...  # an error but UnavailableError: it failed on the plan itself


class Slots(Protocol):
    """The places on the device."""

    async def load(self, digest: str, slot: int) -> None: ...
    async def unload(self, slot: int) -> None: ...


class Staging(Protocol):
    """Adapters in host memory."""

    async def stage(self, reference: AdapterReference) -> StagedAdapter: ...
    async def merge(self, digest: str, digests: Sequence[str], merged: MergedReference) -> StagedAdapter: ...
    async def unstage(self, digest: str) -> None: ...


class EngineShards(Steps, Slots, Protocol):
    """What an engine needs."""


class AdapterShards(Slots, Staging, Protocol):
    """What brings adapters to a replica and takes them away."""


class Shards(Steps, Slots, Staging, Protocol):
    """All that is asked of a replica's shards."""

    async def local_adapters(self) -> list[LocalAdapter]: ...
    async def compile_grammar(self, grammar: Grammar) -> None: ...
