"""The seam to a replica, driven as if it were one."""

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


class Shards(Protocol):
    """What the engine and the adapter registry need of a replica. Every call raises LoraplexError."""

    async def send(self, plan: pb.StepRequest) -> None: ...
    async def receive(self) -> pb.StepResponse: ...  # an error but UnavailableError: it failed on the plan itself
    async def stage(self, reference: AdapterReference) -> StagedAdapter: ...
    async def merge(self, digest: str, digests: Sequence[str], merged: MergedReference) -> StagedAdapter: ...
    async def unstage(self, digest: str) -> None: ...
    async def load(self, digest: str, slot: int) -> None: ...
    async def unload(self, slot: int) -> None: ...
    async def local_adapters(self) -> list[LocalAdapter]: ...
    async def compile_grammar(self, grammar: Grammar) -> None: ...
