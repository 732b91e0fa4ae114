"""The seam to a group of shards, driven as if it were one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from loraplex_protos import shard_pb2 as pb
from loraplex_router.grammar import Grammar
from loraplex_router.request import AdapterReference, MergedReference
from loraplex_router.text.chat import AdapterTokenizer


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    """An adapter in the host memory of every rank."""

    digest: str
    source: str
    revision: str
    lora_rank: int
    size_bytes: int  # over all ranks
    tokenizer: AdapterTokenizer = field(default_factory=AdapterTokenizer)
    warnings: tuple[str, ...] = ()  # what may be wrong with it though it is served


@dataclass(frozen=True, slots=True)
class LocalAdapter:
    """A name in the adapter directory."""

    id: str
    fault: str = ""  # why it cannot be served; empty: nothing is wrong as far as can be seen
    warnings: tuple[str, ...] = ()


class Shards(Protocol):
    """What the engine and the adapter registry need of a group. Every call raises LoraplexError."""

    async def send(self, plan: pb.StepRequest) -> None: ...
    async def receive(self) -> pb.StepResponse: ...  # an error but UnavailableError: it failed on the plan itself
    async def stage(self, reference: AdapterReference) -> StagedAdapter: ...
    async def merge(self, digest: str, digests: Sequence[str], merged: MergedReference) -> StagedAdapter: ...
    async def unstage(self, digest: str) -> None: ...
    async def load(self, digest: str, slot: int) -> None: ...
    async def unload(self, slot: int) -> None: ...
    async def local_adapters(self) -> list[LocalAdapter]: ...
    async def compile_grammar(self, grammar: Grammar) -> None: ...
