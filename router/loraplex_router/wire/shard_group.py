"""A tensor-parallel group over gRPC, driven as if it were one shard. Transport only, no policy."""

import asyncio
import errno
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.errors import (
    AdapterSourceError,
    InvalidRequestError,
    LoraplexError,
    UnavailableError,
)
from loraplex_protos.shard_pb2_grpc import ShardServiceStub
from loraplex_router.vocabulary.adapter import Adapter, Fetch, LocalAdapter, StagedAdapter
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.references import AdapterReference, MergedReference, Upload
from loraplex_router.wire.adapter_codec import merge_parts, read_invocation, read_staged, upload_parts
from loraplex_router.wire.calls import (
    ANSWER_SECONDS,
    CONNECTION_CLOSED,
    LONG_ANSWER_SECONDS,
    agree,
    all_of,
    check_health,
    settled,
    typed,
    watch_health,
    within,
)
from loraplex_router.wire.codec import encode_grammar
from loraplex_router.wire.discovery import Address
from loraplex_router.wire.pulse import TICK_SECONDS, Pulse, SilentError
from loraplex_router.wire.shards import PartlyStagedError, ShardsObserver

if TYPE_CHECKING:
    from loraplex_protos.shard_pb2_grpc import ShardServiceAsyncStub

logger = logging.getLogger(__name__)

CHANNEL_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.max_receive_message_length", 64 << 20),  # a tokenizer.json can have 20 MB
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),  # to find a shard soon after it has loaded its model
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_http_proxy", 0),  # one in the environment is for adapter sources, and does not lead to ranks
    # While the router connects, nobody watches yet: pings notice that a rank's host is gone, and end its connection.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),  # no limit
    ("grpc.use_local_subchannel_pool", 1),  # who connects anew takes no connection over that may hang
)

RETRY_SECONDS = 0.1
AT_A_TIME = 100  # local adapters decoded without a pause
PING_SECONDS = 0.5  # between an answer and the next ping
# A rank's port opens once its model is loaded: a closed port is not logged for this long.
LOADING_SECONDS = 60.0
CLOSED = os.strerror(errno.ECONNREFUSED), os.strerror(errno.ENOENT)
MTLS_HINT = "mutual TLS: each side's certificate must be signed by the other's --mtls-ca; see also the rank's log"

_READING = ThreadPoolExecutor(4, "uploads")  # whose disk may hang

T = TypeVar("T")
Stream = grpc.aio.StreamStreamCall[pb.StepRequest, pb.StepResponse]


class ShardGroup:
    """The ranks of a group over gRPC, rank 0 first. Every rank gets the same plans in the same order.

    `credentials` is None for connections that are not encrypted.
    """

    def __init__(
        self, address: Address, observer: ShardsObserver, credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        self._address = address
        self._observer = observer
        self._credentials = credentials
        self._channels: list[grpc.aio.Channel] = []
        self._stubs: list[ShardServiceAsyncStub] = []
        self._streams: list[Stream] = []
        self._sent: deque[float] = deque()  # when each plan without a result so far was sent, by time.monotonic
        self._answered: list[float] = []  # when each rank last answered
        self._pulse: Pulse | None = None  # set once all ranks are reachable
        self._reached = asyncio.Event()
        self._closed = False
        self.info = pb.GetInfoResponse()

    async def connect(self) -> Self:
        """Waits for all ranks (the log says why one is out of reach), checks that they form one group, makes them
        forget all adapters, and opens the step streams. Raises UnavailableError, also if another router is driving
        them."""
        self._open(self._address.ranks[0])
        first = await self._reach(0)
        for rank in self._address.other_ranks(first.tensor_parallel_size):
            self._open(rank)
        infos = await asyncio.gather(*map(self._reach, range(len(self._stubs))))
        await asyncio.gather(*map(check_health, self._channels))
        self.info = agree(infos)
        pulse = self._pulse = Pulse(len(infos), self.info.compiles, self.info.longest_step_us / 1e6)
        self._reached.set()
        await self._on_all(lambda rank: within(LONG_ANSWER_SECONDS, rank.Reset, pb.ResetRequest()))
        pulse.begin()
        self._streams = [rank.Step() for rank in self._ranks]
        self._answered = [0.0] * len(self._stubs)
        return self

    def _open(self, rank: str) -> None:
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(rank, options=CHANNEL_OPTIONS)
        else:
            name = self._address.server_name  # the name in the certificate, if the address came from DNS
            override = (("grpc.ssl_target_name_override", name),) if name else ()
            channel = grpc.aio.secure_channel(rank, self._credentials, options=CHANNEL_OPTIONS + override)
        self._channels.append(channel)
        self._stubs.append(ShardServiceStub(channel))

    @property
    def _ranks(self) -> list["ShardServiceAsyncStub"]:
        """The ranks, to call them. Raises UnavailableError after `close`: gRPC's own error is no LoraplexError."""
        if self._closed:
            raise UnavailableError(CONNECTION_CLOSED)
        return self._stubs

    async def _reach(self, rank: int) -> pb.GetInfoResponse:
        """Tries until the rank answers. Logs each reason for failure once."""
        began, told = time.monotonic(), ""
        while True:
            try:
                return await within(ANSWER_SECONDS, self._ranks[rank].GetInfo, pb.GetInfoRequest())
            except UnavailableError as error:
                loading = any(closed in error.message for closed in CLOSED)
                if error.message != told and not (loading and time.monotonic() - began < LOADING_SECONDS):
                    told = error.message
                    hint = f" ({MTLS_HINT})" if self._credentials else ""
                    logger.warning("replica %s: rank %d is out of reach: %s%s", self._address, rank, told, hint)
            await asyncio.sleep(RETRY_SECONDS)

    async def watch(self, tell: Callable[[bool], None]) -> None:
        """Watches the ranks once they are reachable, until cancelled. Calls `tell` when they fall silent, which may be
        temporary, and when they answer again. Raises SilentError after too long a silence, UnavailableError if a rank
        is gone."""
        await self._reached.wait()
        pulse = self._pulse
        assert pulse is not None
        pings = [asyncio.create_task(self._ping(rank, pulse)) for rank in range(len(self._stubs))]
        last, silent = time.monotonic(), False
        try:
            while True:
                await asyncio.wait(pings, timeout=TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for ping in pings:
                    if ping.done():
                        ping.result()
                if pulse.idle and any(stream.done() for stream in self._streams):
                    raise UnavailableError("a rank ended its step stream")
                now = time.monotonic()
                pulse.tick(now - last)
                last, silence = now, pulse.silence()
                if silence.final:
                    raise SilentError(f"{silence}: the replica is given up")
                if silence.suspicious != silent:
                    silent = silence.suspicious
                    meaning = f"{silence}: sending nothing new" if silent else "it answers again"
                    logger.warning("replica %s: %s", self._address, meaning)
                    tell(silent)
        finally:
            for ping in pings:
                ping.cancel()

    async def _ping(self, rank: int, pulse: Pulse) -> None:
        health: Any = HealthStub(self._channels[rank])
        while True:
            pulse.pinged(rank)
            await typed(health.Check(HealthCheckRequest()))
            pulse.answered(rank)
            await asyncio.sleep(PING_SECONDS)

    async def stopping(self) -> None:
        """Returns when a rank is about to stop and should get nothing new. Raises UnavailableError if one is gone."""
        watches = [asyncio.create_task(watch_health(channel)) for channel in self._channels]
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            for watch in done:
                await watch
        finally:
            for watch in watches:
                watch.cancel()

    async def tokenizer(self) -> pb.GetTokenizerResponse:
        return await within(LONG_ANSWER_SECONDS, self._ranks[0].GetTokenizer, pb.GetTokenizerRequest())

    async def send(self, plan: pb.StepRequest) -> None:
        assert self._pulse is not None
        for stream in self._streams:
            await typed(stream.write(plan))
        self._sent.append(time.monotonic())
        self._pulse.sent(sum(plan.lengths))

    async def receive(self) -> pb.StepResponse:
        """The next plan's result. Every rank answers, so that no failure goes unnoticed; rank 0's answer is used."""
        assert self._pulse is not None
        sent = self._sent.popleft()
        if len(self._streams) == 1:
            first = await self._read(0, sent)
        else:
            try:
                first, *others = await asyncio.gather(*(self._read(rank, sent) for rank in range(len(self._streams))))
            except UnavailableError:
                raise
            except LoraplexError as error:  # it may have failed because another rank is gone
                raise UnavailableError(error.message) from error
            assert all(other.step == first.step for other in others)
        self._pulse.stepped()
        return first

    async def _read(self, rank: int, sent: float) -> pb.StepResponse:
        """A rank's answer to the plan sent at `sent`, which it could start once the previous one was done."""
        answer = await typed(self._streams[rank].read())
        if not isinstance(answer, pb.StepResponse):
            raise UnavailableError("a rank ended its step stream")
        now, began = time.monotonic(), max(sent, self._answered[rank])
        self._answered[rank] = now
        self._observer.rank_latency(rank, max(0.0, now - began - answer.duration_us / 1e6))
        return answer

    async def stage(self, reference: AdapterReference) -> StagedAdapter:
        """Rank 0 resolves the reference; the other ranks then read exactly that content."""
        request = pb.StageAdapterRequest(
            id=reference.id, source=reference.source, revision=reference.revision, token=reference.token
        )
        with self._observer.loading("host"):
            first = await typed(self._ranks[0].StageAdapter(request))
            request.source, request.revision = first.source, first.revision
            others, error = await settled(rank.StageAdapter(request) for rank in self._ranks[1:])
            _check_whole({first.digest, *(other.digest for other in others)}, error)
        return read_staged([first, *others])

    async def upload(self, upload: Upload) -> StagedAdapter:
        """Sends the files to all ranks."""
        files = await asyncio.get_running_loop().run_in_executor(_READING, upload.read)
        with self._observer.loading("host"):
            answers, error = await settled(rank.StageUpload(upload_parts(files)) for rank in self._ranks)
            _check_whole({answer.adapter.digest for answer in answers}, error)
        return read_staged([answer.adapter for answer in answers])

    async def merge(
        self, digest: str, digests: Sequence[str], merged: MergedReference, uploads: Mapping[str, Upload]
    ) -> StagedAdapter:
        """Merges staged adapters into one called `digest`; the `uploads` among them, by digest, are sent again. The
        reference has been checked and has all weights."""
        request = pb.MergeAdaptersRequest(
            digest=digest,
            digests=digests,
            weights=merged.weights,
            strategy=merged.strategy,
            density=merged.density,
            majority_sign_method=merged.majority_sign_method,
        )
        files = {
            digest: await asyncio.get_running_loop().run_in_executor(_READING, upload.read)
            for digest, upload in uploads.items()
        }
        with self._observer.loading("host"):
            if files:
                sent, error = await settled(rank.MergeUploads(merge_parts(request, files)) for rank in self._ranks)
                answers = [each.merged for each in sent]
            else:
                answers, error = await settled(rank.MergeAdapters(request) for rank in self._ranks)
            _check_whole({digest} if answers else set(), error)
        size, on_device = sum(answer.size_bytes for answer in answers), max(answer.device_bytes for answer in answers)
        return StagedAdapter(digest, "merged", "", answers[0].lora_rank, size, on_device)

    async def unstage(self, digest: str) -> None:
        await self._on_all(lambda rank: rank.UnstageAdapter(pb.UnstageAdapterRequest(digest=digest)))
        self._observer.evicted("host")

    async def load(self, digest: str, slot: int) -> None:
        with self._observer.loading("device"):
            await self._on_all(lambda rank: rank.LoadAdapter(pb.LoadAdapterRequest(digest=digest, slot=slot)))

    async def unload(self, slot: int) -> None:
        await self._on_all(lambda rank: rank.UnloadAdapter(pb.UnloadAdapterRequest(slot=slot)))
        self._observer.evicted("device")

    async def refusals(self, references: Sequence[AdapterReference]) -> list[str]:
        """Why no source can have each adapter, as far as it is known without asking over the network; empty: one
        may."""
        asked = [pb.FetchAdapterRequest(id=each.id, source=each.source, revision=each.revision) for each in references]
        answer = await typed(
            self._ranks[0].RefuseAdapters(pb.RefuseAdaptersRequest(adapters=asked), timeout=ANSWER_SECONDS)
        )
        return list(answer.reasons)

    async def fetch(self, reference: AdapterReference) -> int:
        """Brings an adapter's files to the disk of every rank. Returns their size in bytes."""
        request = pb.FetchAdapterRequest(id=reference.id, source=reference.source, revision=reference.revision)
        return max(answer.size_bytes for answer in await self._on_all(lambda rank: rank.FetchAdapter(request)))

    async def fetches(self) -> list[Fetch]:
        """What rank 0 is fetching."""
        answer = await typed(self._ranks[0].ListFetches(pb.ListFetchesRequest(), timeout=ANSWER_SECONDS))
        return [
            Fetch(each.id, each.source, each.revision, each.fetched_bytes, each.total_bytes, each.trouble)
            for each in answer.fetches
        ]

    async def local_adapters(self) -> list[LocalAdapter]:
        answer = await typed(self._ranks[0].ListLocalAdapters(pb.ListLocalAdaptersRequest()))
        found: list[LocalAdapter] = []
        for number, adapter in enumerate(answer.adapters):
            if number % AT_A_TIME == 0:
                await asyncio.sleep(0)  # there may be thousands: let other tasks run
            invocation = read_invocation(adapter)
            found.append(LocalAdapter(adapter.id, adapter.fault, tuple(adapter.warnings), invocation))
        return found

    async def compile_grammar(self, grammar: Grammar, adapter: Adapter) -> tuple[str, ...]:
        """Only rank 0 samples, so it alone needs grammars. Returns warnings about what is not enforced. Raises
        InvalidRequestError with the reason."""
        request = pb.CompileGrammarRequest(grammar=encode_grammar(grammar, adapter))
        try:
            answer = await typed(self._ranks[0].CompileGrammar(request))
        except InvalidRequestError as error:
            raise grammar.refusal(error) from error
        return tuple(grammar.unenforced(schema.field, schema.keywords) for schema in answer.unenforced)

    async def close(self) -> None:
        self._closed = True
        for stream in self._streams:
            stream.cancel()
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def _on_all(self, call: Callable[["ShardServiceAsyncStub"], Awaitable[T]]) -> list[T]:
        return await all_of(call(rank) for rank in self._ranks)


def _check_whole(held: Set[str], error: BaseException | None) -> None:
    """Raises an error unless all ranks have staged the same adapter. `held`: the digests that they answered with."""
    if error is None and len(held) > 1:
        error = AdapterSourceError("the ranks have read different files: the adapter has changed meanwhile, try again")
    if isinstance(error, LoraplexError) and held:
        raise PartlyStagedError(error, held)
    if error is not None:
        raise error
