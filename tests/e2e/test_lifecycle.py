"""Requests that end early, full queues, too few blocks, servers that stop: nothing is leaked or lost."""

import asyncio
import contextlib
import json
import os
import signal
import socketserver
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

import grpc
import psutil
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from transformers import RwkvConfig, RwkvForCausalLM

from loraplex import (
    AdapterNotFoundError,
    AsyncClient,
    Client,
    DeadlineError,
    FinishReason,
    InvalidRequestError,
    OverloadedError,
    RequestNotFoundError,
    UnavailableError,
)
from loraplex_protos import shard_pb2
from loraplex_protos.shard_pb2_grpc import ShardServiceStub
from tests.e2e.processes import ForkingShard, Process, Router, Server, Shard, free_port, run
from tests.e2e.tiny import Oracle, byte_tokenizer

FOREVER = {"max_new_tokens": 6000, "ignore_eos": True}


async def test_cancelled_disconnected_and_late_requests_free_all_blocks(server: Server):
    async with AsyncClient(server.address) as client:

        async def leaves_the_loop():
            async for piece in client.stream("leaves", adapter="r4", **FOREVER):
                if piece.tokens:
                    break

        async def is_cancelled_by_name():
            pieces = [piece async for piece in client.stream("named", request_id="named", **FOREVER)]
            assert pieces[-1].finish_reason is FinishReason.CANCELLED

        async def cancels():
            while True:
                try:
                    return await client.cancel("named")
                except RequestNotFoundError:
                    await asyncio.sleep(0.05)

        async def runs_out_of_time():
            with pytest.raises(DeadlineError):
                await client.generate("late", adapter="r8", timeout=1.0, **FOREVER)

        async def whose_task_is_cancelled():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await client.generate("cancelled", n=3, temperature=1.0, **FOREVER)

        await asyncio.gather(
            leaves_the_loop(), is_cancelled_by_name(), cancels(), runs_out_of_time(), whose_task_is_cancelled()
        )
    server.assert_nothing_is_held()


def test_requests_of_a_client_that_died_free_all_blocks(server: Server):
    with Client(server.address) as client:
        next(client.stream("gone", **FOREVER))  # the channel closes during the call
    server.assert_nothing_is_held()


def test_a_request_id_cannot_be_used_twice_at_the_same_time(server: Server):
    with Client(server.address) as client:
        stream = client.stream("first", request_id="mine", **FOREVER)
        next(stream)
        with pytest.raises(InvalidRequestError, match="request_id"):
            client.generate("second", request_id="mine", max_new_tokens=1)
        stream.close()


async def test_a_long_prompt_does_not_stop_other_streams(server: Server):
    async with AsyncClient(server.address) as client:
        stream = client.stream("short", **FOREVER)
        await anext(stream)
        long = asyncio.create_task(client.generate("long " * 1500, max_new_tokens=1, ignore_eos=True))
        tokens_meanwhile = 0
        while not long.done():
            tokens_meanwhile += len((await anext(stream)).tokens)
        assert long.result().sequences[0].usage.prompt_tokens == 7500
        assert tokens_meanwhile >= 7500 // 256  # at least one for each chunk of the prompt
        await stream.aclose()


async def test_sequences_that_outgrow_the_cache_are_preempted_without_losing_tokens(
    model: Path, adapters: Path, oracle: Oracle
):
    prompts = [f"{index} sequences compete for few blocks" for index in range(6)]
    with Server(str(model), f"--adapters={adapters}", "--kv-blocks=16", "--max-model-len=200", "--threads=1") as server:
        async with AsyncClient(server.address) as client:
            names = [None, "r8"] * 3
            answers = await asyncio.gather(
                *(
                    client.generate(prompt, adapter=name, max_new_tokens=60, ignore_eos=True)
                    for prompt, name in zip(prompts, names, strict=True)
                )
            )
        assert server.metric("loraplex_preemptions_total") > 0
        for prompt, name, answer in zip(prompts, names, answers, strict=True):
            expected, _ = oracle.generate(byte_tokenizer().encode(prompt), name, 60)
            assert [token.id for token in answer.sequences[0].tokens] == expected
        server.assert_nothing_is_held()


async def test_a_full_queue_refuses_at_once_and_serves_what_it_holds(model: Path):
    flags = "--max-queue=4", "--max-sequences=1", "--kv-blocks=64", "--max-model-len=1024", "--threads=1"
    with Server(str(model), *flags) as server:
        async with AsyncClient(server.address, max_retries=0) as client:
            running = client.stream("running", max_new_tokens=600, ignore_eos=True)
            await anext(running)
            queued = [asyncio.create_task(client.generate(f"{i}", max_new_tokens=2)) for i in range(4)]
            await asyncio.to_thread(server.wait_until, 'loraplex_sequences{state="waiting"}', 4)
            with pytest.raises(OverloadedError):
                await client.generate("one too many", max_new_tokens=2)
            await running.aclose()
            assert all([answer.sequences[0].tokens for answer in await asyncio.gather(*queued)])
        server.assert_nothing_is_held()


async def test_sigterm_refuses_new_requests_lets_running_ones_finish_and_exits_with_zero(model: Path):
    with Server(str(model), "--kv-blocks=2048", "--threads=1", "--drain-seconds=120") as server:
        assert server.health() == 200
        async with AsyncClient(server.address) as client:
            streams = [client.stream(f"{i}", max_new_tokens=200, ignore_eos=True) for i in range(32)]
            pieces = [[piece] for piece in await asyncio.gather(*map(anext, streams))]
            server.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(wait_for_health, server, 503)
            with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
                await asyncio.to_thread(check_health, server)
            with pytest.raises(UnavailableError):
                await client.generate("too late", max_new_tokens=1, timeout=60)
            for stream, seen in zip(streams, pieces, strict=True):
                seen += [piece async for piece in stream]
                assert seen[-1].finish_reason is FinishReason.LENGTH
                assert sum(len(piece.tokens) for piece in seen) == 200
        assert server.process.wait(60) == 0


async def test_a_signal_to_all_processes_of_a_server_is_one_to_the_server(model: Path, adapters: Path):
    """Its ranks and theirs do what it tells them: what runs and what waits is finished, and nothing is restarted."""
    flags = f"--adapters={adapters}", "--kv-blocks=512", "--max-sequences=1", "--threads=1", "--drain-seconds=600"
    with Server(str(model), *flags) as server:
        async with AsyncClient(server.address) as client:
            running = client.stream("running", max_new_tokens=500, ignore_eos=True)
            pieces = [await anext(running)]
            waiting = asyncio.create_task(client.generate("waiting", adapter="r8", max_new_tokens=9, ignore_eos=True))
            await asyncio.to_thread(server.wait_until, 'loraplex_sequences{state="waiting"}', 1)
            server.terminate_with_all_it_started()
            pieces += [piece async for piece in running]
            assert sum(len(piece.tokens) for piece in pieces) == 500
            assert (await waiting).sequences[0].usage.generated_tokens == 9
        assert server.process.wait(60) == 0
    assert "restarting" not in server.log and "ended with" not in server.log


async def test_requests_that_outlast_the_drain_end_with_an_error(model: Path):
    with Server(str(model), "--kv-blocks=512", "--threads=1", "--drain-seconds=0.5") as server:
        async with AsyncClient(server.address) as client:
            stream = client.stream("endless", **FOREVER)
            await anext(stream)
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(UnavailableError, match="shutting down: send the request again"):
                [piece async for piece in stream]
        assert server.process.wait(60) == 0


async def test_two_ranks_have_their_own_metrics_and_end_with_the_server_at_the_second_ctrl_c(
    model: Path, tmp_path: Path
):
    port = free_port()
    flags = "--tp=2", "--kv-blocks=512", "--threads=1", "--drain-seconds=600", f"--metrics-port={port}"
    # A package that only ranks import; another process's `python -m` would find it in the current directory.
    (tmp_path / "accelerate.py").write_text("raise SystemExit('a file of the current directory was imported')")
    with Server(str(model), *flags, cwd=str(tmp_path)) as server:
        for rank in (0, 1):
            with urllib.request.urlopen(f"http://127.0.0.1:{port + rank}/metrics", timeout=60) as response:
                assert f'loraplex_shard_build_info{{model="{model}",rank="{rank}"' in response.read().decode()
        children = psutil.Process(server.process.pid).children()
        ranks = [child for child in children if "shard" in child.cmdline()]  # the other processes render templates
        assert len(ranks) == 2
        async with AsyncClient(server.address) as client:
            streams = [client.stream(f"{i}", **FOREVER) for i in range(4)]
            await asyncio.gather(*map(anext, streams))
            embedding = asyncio.create_task(client.embed(["long " * 1000] * 4))
            await asyncio.sleep(0.1)
            server.process.send_signal(signal.SIGINT)
            await asyncio.to_thread(wait_for_health, server, 503)
            server.process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(server.process.wait, 60) == 0
            await asyncio.gather(embedding, *(stream.aclose() for stream in streams), return_exceptions=True)
        assert not any(child.is_running() for child in children)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_server_that_is_stopped_while_it_starts_leaves_nothing(
    model: Path, tmp_path: Path, number: signal.Signals, status: int
):
    flags = "--http-port=0", "--grpc-port=0", "--tp=2", "--kv-blocks=64"
    with Process("serve", str(model), *flags, env={"TMPDIR": str(tmp_path)}) as serve:
        while len(ranks := psutil.Process(serve.process.pid).children()) < 2:
            threading.Event().wait(0.01)
        serve.process.send_signal(number)
        serve.process.send_signal(number)
        assert serve.process.wait(60) == status
    assert "Traceback" not in serve.log
    assert psutil.wait_procs(ranks, timeout=30)[1] == []
    assert not list(tmp_path.iterdir())


def test_a_shard_that_is_stopped_while_it_forks_its_stager_ends(model: Path):
    flags = f"--model={model}", f"--listen=127.0.0.1:{free_port()}", "--kv-blocks=64", "--threads=1"
    with ForkingShard(*flags) as shard:
        assert shard.process.wait(120) == 0


def test_a_shard_that_stops_waits_neither_for_a_download_nor_at_ctrl_c_for_its_router(model: Path):
    address = f"127.0.0.1:{free_port()}"
    asked = threading.Event()
    with EndlessHub(asked) as hub:
        flags = f"--model={model}", f"--listen={address}", "--kv-blocks=64", "--threads=1", "--drain-seconds=600"
        with Shard(*flags, env={"HF_ENDPOINT": hub.url}) as shard, grpc.insecure_channel(address) as channel:
            reference = shard_pb2.StageAdapterRequest(id="org/name")
            stub = ShardServiceStub(channel)
            staging = stub.StageAdapter.future(reference, wait_for_ready=True)
            assert asked.wait(60)
            router = stub.Step(iter(threading.Event().wait, None))
            while not stub.GetInfo(shard_pb2.GetInfoRequest()).driven:
                threading.Event().wait(0.01)
            states = HealthStub(channel).Watch(HealthCheckRequest())
            while next(states).status == HealthCheckResponse.SERVING:
                shard.process.send_signal(signal.SIGTERM)
            shard.process.send_signal(signal.SIGTERM)
            assert stub.GetInfo(shard_pb2.GetInfoRequest()).driven
            shard.process.send_signal(signal.SIGINT)
            assert shard.process.wait(60) == 0
            assert staging.exception() is not None and router.exception() is not None


def test_a_router_whose_disk_hangs_still_answers_and_stops(tmp_path: Path):
    registry, keys = tmp_path / "registry.yaml", tmp_path / "keys.yaml"
    registry.write_text("adapters: {}")
    keys.write_text(f"tenants: {{acme: {{keys: ['{'0' * 64}']}}}}")
    with Router("--shards=unix:/nowhere", f"--adapter-registry={registry}", f"--api-keys={keys}") as router:
        for path in registry, keys:
            os.mkfifo(tmp_path / "new")
            (tmp_path / "new").replace(path)  # whoever reads it waits for what is never written
            while True:
                with contextlib.suppress(OSError):  # nobody reads it yet
                    os.open(path, os.O_WRONLY | os.O_NONBLOCK)
                    break
                time.sleep(0.01)
        for _ in range(3):
            assert router.health() == 503
        assert router.terminate() == 0


class EndlessHub(socketserver.ThreadingTCPServer):
    """Begins to answer each call, and continues byte by byte."""

    daemon_threads = True

    def __init__(self, asked: threading.Event) -> None:
        class Endless(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99999\r\n\r\n")
                asked.set()
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write(b" ")
                        threading.Event().wait(0.2)

        super().__init__(("127.0.0.1", 0), Endless)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


def wait_for_health(server: Server, status: int) -> None:
    for _ in range(500):
        if server.health() == status:
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"health is {server.health()}")


async def test_ranks_that_die_or_hang_are_restarted_and_streams_continue_from_their_last_token(
    model: Path, adapters: Path
):
    with Server(str(model), f"--adapters={adapters}", "--kv-blocks=512", "--threads=1", "--tp=2") as server:
        async with AsyncClient(server.address) as client:
            names, options = [None, "r8"], {"max_new_tokens": 1000, "ignore_eos": True}
            whole = await asyncio.gather(*(client.generate("killed", adapter=name, **options) for name in names))
            streams = [client.stream("killed", adapter=name, **options) for name in names]
            pieces = [[await anext(stream)] for stream in streams]
            for rank, number in enumerate((signal.SIGKILL, signal.SIGSTOP)):
                rank_of(server, rank).send_signal(number)
                await asyncio.to_thread(wait_for_health, server, 503)
                # Requests that arrive in the meantime wait too.
                assert (await client.generate("meanwhile", max_new_tokens=2, timeout=120)).text
                assert server.health() == 200
            for answer, stream, seen in zip(whole, streams, pieces, strict=True):
                seen += [piece async for piece in stream]
                tokens = [token.id for piece in seen for token in piece.tokens]
                assert tokens == [token.id for token in answer.sequences[0].tokens]
        assert server.terminate() == 0
    assert "rank 0 was killed by SIGKILL" in server.log and "the replica is given up" in server.log


def rank_of(server: Server, rank: int) -> psutil.Process:
    return next(c for c in psutil.Process(server.process.pid).children() if f"--rank={rank}" in c.cmdline())


def check_health(server: Server) -> int:
    with grpc.insecure_channel(server.address) as channel:
        return HealthStub(channel).Check(HealthCheckRequest(), timeout=60).status


def test_prompts_and_answers_are_not_logged_whether_requests_are_served_or_refused(server: Server):
    said = "between-us"
    with Client(server.address, api_key=said) as client:
        assert client.generate(said, max_new_tokens=2).text
        with pytest.raises(AdapterNotFoundError):
            client.generate(said, adapter="unknown-adapter", max_new_tokens=2)
        with pytest.raises(InvalidRequestError):
            client.generate(said, stop=[said] * 100)
    for path, body in (
        ("/v1/completions", {"model": "", "prompt": said, "max_tokens": 2}),
        ("/v1/chat/completions", {"model": "", "messages": [{"role": said, "content": said}], "temperature": said}),
        ("/generate", {"inputs": said, "parameters": {"adapter_id": "unknown-adapter", "api_token": said}}),
        ("/generate", said),
    ):
        request = urllib.request.Request(f"{server.url}{path}?key={said}", json.dumps(body).encode())
        request.add_header("Authorization", f"Bearer {said}")
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=60) as response:
            response.read()
    assert "outcome=finished" in server.log and "outcome=adapter_not_found" in server.log
    assert said not in server.log


def test_the_standard_health_and_reflection_services_work(server: Server):
    with grpc.insecure_channel(server.address) as channel:
        for name in ("", "loraplex.v1.GenerationService"):
            answer = HealthStub(channel).Check(HealthCheckRequest(service=name), timeout=60)
            assert answer.status == HealthCheckResponse.SERVING
        listing = ServerReflectionStub(channel).ServerReflectionInfo(
            iter([ServerReflectionRequest(list_services="")]), timeout=10
        )
        names = {service.name for service in next(listing).list_services_response.service}
        assert "loraplex.v1.GenerationService" in names


def test_a_model_that_cannot_be_served_is_an_error_before_any_port_opens(tmp_path: Path):
    RwkvForCausalLM(RwkvConfig(vocab_size=10, hidden_size=8, num_hidden_layers=2)).save_pretrained(tmp_path)
    result = run("serve", str(tmp_path), "--http-port=0", "--grpc-port=0")
    assert result.returncode == 1
    reason = "RwkvForCausalLM is not served: it keeps state besides keys and values"
    assert reason in " ".join(result.stderr.split()) and "gRPC " not in result.stderr


def test_a_port_in_use_is_an_error_that_names_it(server: Server, model: Path):
    port = server.address.rsplit(":", 1)[1]
    result = run("serve", str(model), "--http-port=0", f"--grpc-port={port}", "--kv-blocks=64")
    assert result.returncode == 1 and port in result.stderr


def test_grpcs_fork_handlers_are_turned_off_before_it_is_imported(server: Server):
    environment = psutil.Process(server.process.pid).environ()
    assert environment["GRPC_ENABLE_FORK_SUPPORT"] == "0"
    assert "fork" not in server.log
