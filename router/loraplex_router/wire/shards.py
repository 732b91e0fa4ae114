"""The interface to a replica's shards, which are driven as if they were one."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.errors import LoraplexError
from loraplex_router.vocabulary.adapter import Adapter, Fetch, LocalAdapter, StagedAdapter
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.references import AdapterReference, MergedReference, Upload


class PartlyStagedError(LoraplexError):
    """Staging has failed with `error`, but some ranks hold `digests` now."""

    def __init__(self, error: LoraplexError, digests: Iterable[str]) -> None:
        super().__init__(error.message)
        self.error = error
        self.digests = frozenset(digests)


class ShardsObserver(Protocol):
    """An observer of the calls to one replica's shards."""

    def rank_latency(self, rank: int, seconds: float) -> None:
        """What a step took beyond the rank's own time."""

    def loading(self, tier: str) -> AbstractContextManager[None]:
        """A context in which an adapter is loaded into a tier: host or device."""

    def evicted(self, tier: str) -> None:
        """An adapter has left a tier."""


class Steps(Protocol):
    """Plans and their results. Like the calls below, these raise LoraplexError."""

    async def send(self, plan: pb.StepRequest) -> None: ...
    async def receive(self) -> pb.StepResponse: ...  # any error but UnavailableError: the plan itself failed


class Slots(Protocol):
    """Slots on the device."""

    async def load(self, digest: str, slot: int) -> None: ...
    async def unload(self, slot: int) -> None: ...


class Staging(Protocol):
    """Adapters in host memory. The first three raise PartlyStagedError if only some ranks hold the adapter then."""

    async def stage(self, reference: AdapterReference) -> StagedAdapter: ...
    async def upload(self, upload: Upload) -> StagedAdapter: ...
    async def merge(
        self, digest: str, digests: Sequence[str], merged: MergedReference, uploads: Mapping[str, Upload]
    ) -> StagedAdapter: ...
    async def unstage(self, digest: str) -> None: ...


class EngineShards(Steps, Slots, Protocol):
    """What an engine needs."""


class AdapterShards(Slots, Staging, Protocol):
    """Everything needed to load and unload a replica's adapters."""


class Shards(Steps, Slots, Staging, Protocol):
    """All calls to a replica's shards."""

    async def refusals(self, references: Sequence[AdapterReference]) -> list[str]: ...  # empty: a source may have it
    async def fetch(self, reference: AdapterReference) -> int: ...  # to the disk of every rank; returns bytes
    async def fetches(self) -> list[Fetch]: ...
    async def local_adapters(self) -> list[LocalAdapter]: ...
    async def compile_grammar(self, grammar: Grammar, adapter: Adapter) -> tuple[str, ...]: ...
