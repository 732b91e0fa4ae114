"""The seam to the shards: one tensor-parallel group, driven as if it were one. Knows the wire, not the policy."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import grpc

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.errors import AdapterSourceError, UnavailableError, from_rpc_error
from loraplex_protos.shard_pb2_grpc import ShardServiceStub
from loraplex_router.grammar import Grammar
from loraplex_router.request import AdapterReference, MergedReference
from loraplex_router.sequence import Chunk, Plan

if TYPE_CHECKING:
    from loraplex_protos.shard_pb2_grpc import ShardServiceAsyncStub

logger = logging.getLogger(__name__)

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),  # a tokenizer.json can have 20 MB
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.initial_reconnect_backoff_ms", 100),  # a shard that loads its model is to be found soon after
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.http2.max_pings_without_data", 0),
)

T = TypeVar("T")
Stream = grpc.aio.StreamStreamCall[pb.StepRequest, pb.StepResponse]


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    """An adapter in the host memory of every rank."""

    digest: str
    source: str
    revision: str
    lora_rank: int
    size_bytes: int  # over all ranks
    chat_template: str = ""  # its own, if it has one


class Shards(Protocol):
    """What the engine and the adapter registry need of a group. Every call raises LoraplexError."""

    async def send(self, plan: pb.StepRequest) -> None: ...
    async def receive(self) -> pb.StepResponse: ...
    async def stage(self, reference: AdapterReference) -> StagedAdapter: ...
    async def merge(self, digest: str, digests: Sequence[str], merged: MergedReference) -> StagedAdapter: ...
    async def unstage(self, digest: str) -> None: ...
    async def load(self, digest: str, slot: int) -> None: ...
    async def unload(self, slot: int) -> None: ...
    async def local_adapters(self) -> list[str]: ...
    async def compile_grammar(self, grammar: Grammar) -> None: ...


class ShardGroup:
    """The ranks of a group over gRPC, rank 0 first. Every rank gets the same plans in the same order."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._channels = [grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for address in addresses]
        self._ranks = [ShardServiceStub(channel) for channel in self._channels]
        self._streams: list[Stream] = []
        self.info = pb.GetInfoResponse()

    async def connect(self, max_batch_tokens: int) -> Self:
        """Waits for all ranks, checks that they are one group, warms them up and opens the step streams."""
        infos = await self._on_all(lambda rank: rank.GetInfo(pb.GetInfoRequest(), wait_for_ready=True))
        self.info = _agree(infos)
        logger.info("%s is loaded, warming up ...", self.info.model_id)
        await self._on_all(lambda rank: rank.Warmup(pb.WarmupRequest(max_batch_tokens=max_batch_tokens)))
        self._streams = [rank.Step() for rank in self._ranks]
        return self

    async def tokenizer(self) -> pb.GetTokenizerResponse:
        return await _typed(self._ranks[0].GetTokenizer(pb.GetTokenizerRequest()))

    async def send(self, plan: pb.StepRequest) -> None:
        for stream in self._streams:
            await _typed(stream.write(plan))

    async def receive(self) -> pb.StepResponse:
        """The next plan's result. Every rank answers, so that no rank's failure goes unnoticed; rank 0's counts."""
        first, *others = await asyncio.gather(*map(_read, self._streams))
        assert all(other.step == first.step for other in others)
        return first

    async def stage(self, reference: AdapterReference) -> StagedAdapter:
        """Rank 0 resolves the reference; the others then read exactly what it found."""
        request = pb.StageAdapterRequest(
            id=reference.id, source=reference.source, revision=reference.revision, token=reference.token
        )
        first = await _typed(self._ranks[0].StageAdapter(request))
        request.source, request.revision = first.source, first.revision
        others = await asyncio.gather(*(_typed(rank.StageAdapter(request)) for rank in self._ranks[1:]))
        if any(other.digest != first.digest for other in others):
            raise AdapterSourceError(f"adapter {reference.id!r}: the ranks read different files")
        size = first.size_bytes + sum(other.size_bytes for other in others)
        return StagedAdapter(first.digest, first.source, first.revision, first.lora_rank, size, first.chat_template)

    async def merge(self, digest: str, digests: Sequence[str], merged: MergedReference) -> StagedAdapter:
        """Merges staged adapters into one called `digest`. The reference has been checked and has all weights."""
        request = pb.MergeAdaptersRequest(
            digest=digest,
            digests=digests,
            weights=merged.weights,
            strategy=merged.strategy,
            density=merged.density,
            majority_sign_method=merged.majority_sign_method,
        )
        answers = await self._on_all(lambda rank: rank.MergeAdapters(request))
        size = sum(answer.size_bytes for answer in answers)
        return StagedAdapter(digest, "merged", "", answers[0].lora_rank, size)

    async def unstage(self, digest: str) -> None:
        await self._on_all(lambda rank: rank.UnstageAdapter(pb.UnstageAdapterRequest(digest=digest)))

    async def load(self, digest: str, slot: int) -> None:
        await self._on_all(lambda rank: rank.LoadAdapter(pb.LoadAdapterRequest(digest=digest, slot=slot)))

    async def unload(self, slot: int) -> None:
        await self._on_all(lambda rank: rank.UnloadAdapter(pb.UnloadAdapterRequest(slot=slot)))

    async def local_adapters(self) -> list[str]:
        answer = await _typed(self._ranks[0].ListLocalAdapters(pb.ListLocalAdaptersRequest()))
        return list(answer.ids)

    async def compile_grammar(self, grammar: Grammar) -> None:
        """Only rank 0 samples, so it alone needs grammars. Raises InvalidRequestError with the reason."""
        await _typed(self._ranks[0].CompileGrammar(pb.CompileGrammarRequest(grammar=_encode_grammar(grammar))))

    async def close(self) -> None:
        for stream in self._streams:
            stream.cancel()
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def _on_all(self, call: Callable[["ShardServiceAsyncStub"], Awaitable[T]]) -> list[T]:
        return await asyncio.gather(*(_typed(call(rank)) for rank in self._ranks))


def encode(plan: Plan, step: int) -> pb.StepRequest:
    """A plan as the shards read it. To be called before the plan's sequences change any further."""
    chunks = plan.chunks
    return pb.StepRequest(
        step=step,
        starts=[_encode_start(chunk) for chunk in chunks if chunk.sequence in plan.starts],
        rows=[chunk.sequence.row or 0 for chunk in chunks],
        lengths=[chunk.length for chunk in chunks],
        slots=[chunk.sequence.adapter.slot or 0 for chunk in chunks],
        samples=[chunk.samples for chunk in chunks],
        block_counts=[len(chunk.new_blocks) for chunk in chunks],
        blocks=[block for chunk in chunks for block in chunk.new_blocks],
    )


def _encode_start(chunk: Chunk) -> pb.SequenceStart:
    sequence = chunk.sequence
    assert sequence.row is not None
    return pb.SequenceStart(
        row=sequence.row,
        tokens=sequence.tokens,
        prompt_length=sequence.prompt_length,
        computed=chunk.start,
        sampling=pb.Sampling(**asdict(sequence.sampling)),
        **asdict(sequence.detail),
        grammar=_encode_grammar(sequence.grammar) if sequence.grammar else None,
        unscored=sequence.unscored,
        min_new_tokens=sequence.min_new_tokens,
        end_token_ids=sequence.end_token_ids if sequence.min_new_tokens else (),
        traceparent=sequence.traceparent,
    )


def _encode_grammar(grammar: Grammar) -> pb.Grammar:
    return pb.Grammar(kind=pb.GrammarKind.ValueType(grammar.kind.value), text=grammar.text)


def _agree(infos: Sequence[pb.GetInfoResponse]) -> pb.GetInfoResponse:
    """One description of the group, with the block count of its smallest rank."""
    for rank, info in enumerate(infos):
        if (info.rank, info.tensor_parallel_size) != (rank, len(infos)):
            place = f"rank {info.rank} of {info.tensor_parallel_size}"
            raise UnavailableError(f"address {rank + 1} of {len(infos)} in --shards answers as {place}")
        if (info.model_id, info.max_model_len) != (infos[0].model_id, infos[0].max_model_len):
            raise UnavailableError(f"rank {rank} serves {info.model_id!r}, rank 0 {infos[0].model_id!r}")
    agreed = pb.GetInfoResponse()
    agreed.CopyFrom(infos[0])
    agreed.num_blocks = min(info.num_blocks for info in infos)
    return agreed


async def _read(stream: Stream) -> pb.StepResponse:
    answer = await _typed(stream.read())
    if not isinstance(answer, pb.StepResponse):
        raise UnavailableError("a rank ended its step stream")
    return answer


async def _typed(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None  # the call's own repr may show its metadata
    except asyncio.InvalidStateError as error:  # a write on a stream that the other side has ended
        raise UnavailableError("the step stream is closed") from error
