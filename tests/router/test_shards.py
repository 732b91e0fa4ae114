"""Connections to shards that speak the real protocol: mutual TLS, several ranks, refusals and losses."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from grpc_health.v1 import health
from pydantic import ValidationError

from bench.stand_in_shard import INFO, Context, StandInServer, StandInShard, Timing
from loraplex_protos import shard_pb2 as pb
from loraplex_protos.errors import AdapterSourceError, LoraplexError, OverloadedError, UnavailableError, to_status
from loraplex_protos.mtls import MtlsSettings, channel_credentials, server_credentials
from loraplex_protos.protocol import PROTOCOL_VERSION
from loraplex_router.adapters.resolutions import Resolutions
from loraplex_router.adapters.staging import AT_A_TIME, AdapterStaging
from loraplex_router.app import Router
from loraplex_router.engine.changes import Changes
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.replicas import connections
from loraplex_router.replicas.connections import adapter_bytes
from loraplex_router.settings import RouterSettings
from loraplex_router.telemetry.opening import open_telemetry
from loraplex_router.vocabulary.references import AdapterReference, MergedReference, Upload
from loraplex_router.wire import calls, shard_group
from loraplex_router.wire.discovery import Address
from loraplex_router.wire.shard_group import ShardGroup
from loraplex_router.wire.shards import PartlyStagedError
from tests.chaos.proxy import Proxy


@dataclass
class Files:
    """Settings with certificates of one authority."""

    folder: Path
    authority: trustme.CA

    def issue(self, name: str, authority: trustme.CA | None = None) -> MtlsSettings:
        """Settings with a certificate for a host, signed by this authority or another; only this one is trusted."""
        leaf = (authority or self.authority).issue_cert(name)
        cert, key, ca = (self.folder / f"{name}-{id(leaf)}.{kind}" for kind in ("crt", "key", "ca"))
        leaf.cert_chain_pems[0].write_to_path(cert)
        leaf.private_key_pem.write_to_path(key)
        self.authority.cert_pem.write_to_path(ca)
        return MtlsSettings(mtls_cert=cert, mtls_key=key, mtls_ca=ca)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("certificates"), trustme.CA())


@pytest.fixture
async def tls_server(files: Files) -> StandInServer:
    return StandInServer(StandInShard(Timing()), "localhost:0", server_credentials(files.issue("localhost")))


async def connect(address: Address, settings: MtlsSettings, seconds: float = 60) -> ShardGroup:
    """Connects within `seconds`, or raises TimeoutError, because a refused channel retries."""
    with open_telemetry(RouterSettings(shards=("stand-in:1",))) as telemetry:
        replica = ShardGroup(address, telemetry.replica(str(address)), channel_credentials(settings))
    try:
        async with asyncio.timeout(seconds):
            return await replica.connect()
    except BaseException:
        await replica.close()
        raise


async def test_router_and_shard_that_trust_each_other_talk(files: Files, tls_server: StandInServer):
    async with tls_server:
        replica = await connect(Address((f"localhost:{tls_server.port}",)), files.issue("router"))
        assert replica.info.model_id == "stand-in"
        await replica.send(pb.StepRequest(step=0))
        assert (await replica.receive()).step == 0
        await replica.close()


async def test_certificates_are_verified_against_the_name_that_was_looked_up(files: Files, tls_server: StandInServer):
    async with tls_server:
        looked_up = f"127.0.0.1:{tls_server.port}"
        with pytest.raises(TimeoutError):
            await connect(Address((looked_up,)), files.issue("router"), seconds=1)
        replica = await connect(Address((looked_up,), server_name="localhost"), files.issue("router"))
        await replica.close()


async def test_a_router_without_a_certificate_of_the_authority_is_refused(files: Files, tls_server: StandInServer):
    async with tls_server:
        address = Address((f"localhost:{tls_server.port}",))
        for settings in (MtlsSettings(), files.issue("router", trustme.CA())):
            with pytest.raises((TimeoutError, UnavailableError)):
                await connect(address, settings, seconds=1)


async def test_a_shard_with_another_authoritys_certificate_is_refused(files: Files):
    credentials = server_credentials(files.issue("localhost", trustme.CA()))
    async with StandInServer(StandInShard(Timing()), "localhost:0", credentials) as server:
        with pytest.raises((TimeoutError, UnavailableError)):
            await connect(Address((f"localhost:{server.port}",)), files.issue("router"), seconds=1)


async def test_a_replica_is_tried_again_while_the_routers_certificate_cannot_be_read(
    files: Files, tls_server: StandInServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connections, "RETRY_SECONDS", 0.05)
    issued = files.issue("router")
    assert issued.mtls_key
    async with tls_server:
        shards = [f"localhost:{tls_server.port}"]
        settings = RouterSettings(shards=shards, http_port=0, grpc_port=0, **issued.model_dump())
        with open_telemetry(settings) as telemetry:
            router, ready = Router(settings, None, telemetry), asyncio.Event()
            away = issued.mtls_key.rename(issued.mtls_key.with_suffix(".away"))
            running = asyncio.create_task(router.run(lambda *_: ready.set()))
            while "No such file" not in caplog.text and not running.done():
                await asyncio.sleep(0.01)
            away.rename(issued.mtls_key)
            await asyncio.wait([running, asyncio.create_task(ready.wait())], return_when=asyncio.FIRST_COMPLETED)
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
    assert ready.is_set() and caplog.text.count("No such file") == 1


def test_either_all_three_files_are_given_or_none(files: Files):
    with pytest.raises(ValidationError, match="mtls_ca: set all of"):
        MtlsSettings(mtls_cert=files.folder, mtls_key=files.folder)
    with pytest.raises(ValidationError, match="mtls_key: file not found"):
        good = files.issue("some")
        MtlsSettings(mtls_cert=good.mtls_cert, mtls_key=files.folder / "absent", mtls_ca=good.mtls_ca)


def rank(number: int, size: int, **changes: object) -> pb.GetInfoResponse:
    info = pb.GetInfoResponse(rank=number, tensor_parallel_size=size)
    merged = pb.GetInfoResponse()
    merged.CopyFrom(INFO)
    merged.MergeFrom(info)
    for name, value in changes.items():
        setattr(merged, name, value)
    return merged


async def start(stack: AsyncExitStack, folder: Path, infos: list[pb.GetInfoResponse]) -> Address:
    for number, info in enumerate(infos):
        await stack.enter_async_context(StandInServer(StandInShard(Timing(), info), f"unix:{folder}/{number}"))
    return Address(tuple(f"unix:{folder}/{number}" for number in range(len(infos))))


class FailingShard(StandInShard):
    def _run(self, plan: pb.StepRequest) -> pb.StepResponse:
        raise RuntimeError("on this plan")


@pytest.mark.parametrize("ranks", [1, 2])
async def test_a_failed_plan_is_distinguished_from_one_that_may_be_lost(tmp_path: Path, ranks: int):
    async with AsyncExitStack() as stack:
        shards = [FailingShard(Timing(), rank(number, ranks)) for number in range(ranks)]
        for number, shard in enumerate(shards):
            await stack.enter_async_context(StandInServer(shard, f"unix:{tmp_path}/{number}"))
        replica = await connect(Address(tuple(f"unix:{tmp_path}/{number}" for number in range(ranks))), MtlsSettings())
        await replica.send(pb.StepRequest(step=0))
        with pytest.raises(LoraplexError) as failed:
            await replica.receive()
        assert isinstance(failed.value, UnavailableError) == (ranks > 1)
        await replica.close()


class BusyShard(StandInShard):
    loaded = False

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.LoadAdapterResponse:
        response = await super().LoadAdapter(request, context)
        self.loaded = True
        return response


class FullShard(StandInShard):
    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.LoadAdapterResponse:
        await context.abort_with_status(to_status(OverloadedError("no memory")))


async def test_what_a_rank_refuses_is_reported_once_the_others_have_answered(tmp_path: Path):
    slow, full = BusyShard(Timing(load=0.2), rank(0, 2)), FullShard(Timing(), rank(1, 2))
    async with AsyncExitStack() as stack:
        for number, shard in enumerate((slow, full)):
            await stack.enter_async_context(StandInServer(shard, f"unix:{tmp_path}/{number}"))
        replica = await connect(Address(tuple(f"unix:{tmp_path}/{number}" for number in range(2))), MtlsSettings())
        with pytest.raises(OverloadedError, match="no memory"):
            await replica.load("a", 1)
        assert slow.loaded
        await replica.close()


async def test_calls_that_are_made_after_the_connection_was_closed_find_the_replica_lost(tmp_path: Path):
    shard = StandInShard(Timing(stage=60), rank(0, 1))
    async with StandInServer(shard, f"unix:{tmp_path}/0"):
        replica = await connect(Address((f"unix:{tmp_path}/0",)), MtlsSettings())
        staging = AdapterStaging(replica, AdapterPool(2, 1000), Resolutions(), Changes(), wake=lambda: None)
        adapters = [AdapterReference(str(number)) for number in range(AT_A_TIME)]
        asking = [asyncio.create_task(staging.resolve(adapter, "acme")) for adapter in adapters]
        while not shard.stages:
            await asyncio.sleep(0.01)
        await replica.close()
        for outcome in await asyncio.gather(*asking, replica.fetches(), return_exceptions=True):
            assert isinstance(outcome, UnavailableError)


class SilentShard(StandInShard):
    """Does not answer one of its calls."""

    def __init__(self, silent: str) -> None:
        super().__init__(Timing())
        setattr(self, silent, self.wait)

    @staticmethod
    async def wait(*_: object) -> pb.GetInfoResponse:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize("call", ["Check", "Reset", "GetTokenizer"])
async def test_a_rank_that_does_not_answer_while_the_router_connects_is_left(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = SilentShard(call)
    if call == "Check":
        monkeypatch.setattr(health.aio.HealthServicer, call, SilentShard.wait)
    for module, limit in (calls, "ANSWER_SECONDS"), (shard_group, "LONG_ANSWER_SECONDS"):
        monkeypatch.setattr(module, limit, 0.5)
    async with StandInServer(shard, f"unix:{tmp_path}/0"):
        with pytest.raises(UnavailableError, match=r"it has not answered for 0\.5 s"):
            replica = await connect(Address((f"unix:{tmp_path}/0",)), MtlsSettings())
            try:
                await replica.tokenizer()
            finally:
                await replica.close()


class LostShard(StandInShard):
    """Its host is gone when it is asked for the first time, and then there again."""

    proxy: Proxy
    was_lost = False

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.GetInfoResponse:
        if not self.was_lost:
            self.was_lost = True
            self.proxy.lose()
        return await super().GetInfo(request, context)


async def test_a_router_that_connects_notices_a_connection_from_which_nothing_comes_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    soon = {"grpc.keepalive_time_ms": 100, "grpc.http2.ping_timeout_ms": 200}
    options = tuple((name, soon.get(name, value)) for name, value in shard_group.CHANNEL_OPTIONS)
    monkeypatch.setattr(shard_group, "CHANNEL_OPTIONS", options)
    monkeypatch.setattr(shard_group, "ANSWER_SECONDS", 0.5)
    shard = LostShard(Timing())
    async with StandInServer(shard, "localhost:0") as server:
        proxy = shard.proxy = await Proxy(server.port).start()
        replica = await connect(Address((f"127.0.0.1:{proxy.port}",)), MtlsSettings())
        assert replica.info.model_id == "stand-in"
        await replica.close()
        await proxy.close()


class StagingShard(StandInShard):
    """Stages what the ranks before it have staged, or does not."""

    def __init__(self, info: pb.GetInfoResponse, digest: str, error: LoraplexError | None = None) -> None:
        super().__init__(Timing(), info)
        self.ended = False
        self._digest, self._error = digest, error

    async def StageAdapter(self, request: pb.StageAdapterRequest, context: Context) -> pb.StageAdapterResponse:
        if self._error is not None:
            status = to_status(self._error)
            await context.abort(status.code, status.details, status.trailing_metadata)
        await asyncio.sleep(0.1)
        self.ended = True
        return pb.StageAdapterResponse(digest=self._digest)

    async def StageUpload(
        self, parts: AsyncIterator[pb.StageUploadRequest], context: Context
    ) -> pb.StageUploadResponse:
        return pb.StageUploadResponse(adapter=await self.StageAdapter(pb.StageAdapterRequest(), context))

    async def MergeAdapters(self, request: pb.MergeAdaptersRequest, context: Context) -> pb.MergeAdaptersResponse:
        await self.StageAdapter(pb.StageAdapterRequest(), context)
        return pb.MergeAdaptersResponse()


async def test_staging_fails_once_all_ranks_have_answered_and_says_what_some_of_them_hold(tmp_path: Path) -> None:
    broken = AdapterSourceError("the source does not answer")
    merged = MergedReference((AdapterReference("a"),), (1.0,))
    ranks = [
        StagingShard(rank(0, 3), "one"),
        StagingShard(rank(1, 3), "", broken),
        StagingShard(rank(2, 3), "another"),
    ]
    async with AsyncExitStack() as stack:
        for number, each in enumerate(ranks):
            await stack.enter_async_context(StandInServer(each, f"unix:{tmp_path}/{number}"))
        replica = await connect(Address(tuple(f"unix:{tmp_path}/{number}" for number in range(3))), MtlsSettings())
        for way, held in (
            (lambda: replica.stage(AdapterReference("a")), {"one", "another"}),
            (lambda: replica.upload(Upload(lambda: {"file": memoryview(b"content")})), {"one", "another"}),
            (lambda: replica.merge("merged", ["a"], merged, {}), {"merged"}),
        ):
            ranks[2].ended = False
            with pytest.raises(PartlyStagedError, match="does not answer") as partly:
                await way()
            assert isinstance(partly.value.error, AdapterSourceError)
            assert ranks[2].ended and partly.value.digests == held
        await replica.close()


async def test_ranks_that_do_not_form_a_replica_are_refused(tmp_path: Path):
    cases = {
        "answers as rank 0 of 2": [rank(0, 2), rank(0, 2)],
        "serves 'another'": [rank(0, 2), rank(1, 2, model_id="another")],
        "another router is driving it": [rank(0, 1, driven=True)],
        f"has version 0 .* this router has version {PROTOCOL_VERSION}: upgrade the shards": [
            rank(0, 1, protocol_version=0)
        ],
        f"has version {PROTOCOL_VERSION + 1} .*: upgrade the router": [
            rank(0, 2),
            rank(1, 2, protocol_version=PROTOCOL_VERSION + 1),
        ],
    }
    for number, (message, infos) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        async with AsyncExitStack() as stack:
            with pytest.raises(UnavailableError, match=message):
                await connect(await start(stack, folder, infos), MtlsSettings())


async def test_a_replica_with_a_different_model_is_refused_with_a_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    async with AsyncExitStack() as stack:
        replicas = []
        for number, changes in enumerate(({}, {}, {"model_id": "another"})):
            folder = tmp_path / str(number)
            folder.mkdir()
            replicas.append(str(await start(stack, folder, [rank(0, 1, **changes)])))
        settings = RouterSettings(shards=replicas, http_port=0, grpc_port=0)
        telemetry = stack.enter_context(open_telemetry(settings))
        router = Router(settings, None, telemetry)
        running = asyncio.create_task(router.run(lambda http, grpc, _: None))
        while "its model_id is" not in caplog.text and not running.done():
            await asyncio.sleep(0.01)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


@pytest.mark.parametrize(
    ("asked_gib", "there", "taken", "warned"),
    [(0.0, 3 << 29, 3 << 30, False), (1.0, 3 << 29, 1 << 30, False), (8.0, 3 << 29, 3 << 30, True)],
)
async def test_adapters_get_the_requested_memory_if_the_ranks_have_it(
    asked_gib: float, there: int, taken: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    ranks = [rank(0, 2, adapter_host_bytes=there), rank(1, 2, adapter_host_bytes=there + 1)]
    async with AsyncExitStack() as stack:
        replica = await connect(await start(stack, tmp_path, ranks), MtlsSettings())
        settings = RouterSettings(shards=("stand-in:1",), adapter_host_gib=asked_gib)
        assert adapter_bytes(settings, replica.info) == taken
        assert ("using that" in caplog.text) == warned
        await replica.close()
