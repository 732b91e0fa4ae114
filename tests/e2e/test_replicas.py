"""Two real replicas behind one router: affinity, one that stops, one that hangs, and one that is killed."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex import AsyncClient, Client, FinishReason, UnavailableError
from tests.e2e.processes import Router, Shard
from tests.e2e.tiny import Oracle, byte_tokenizer

FLAGS = "--kv-blocks=512", "--threads=1", "--drain-seconds=600"
LONG = 3000  # tokens, which take longer than a rank takes that has to end


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sockets")


@pytest.fixture(scope="module")
def router(folder: Path) -> Iterator[Router]:
    with Router(f"--shards=unix:{folder}/0;unix:{folder}/1", "--move-seconds=120") as running:
        yield running


def start(model: Path, adapters: Path, folder: Path, number: int) -> Shard:
    return Shard(f"--model={model}", f"--adapters={adapters}", f"--listen=unix:{folder}/{number}", *FLAGS)


async def test_replicas_come_and_go_without_losing_requests(
    router: Router, model: Path, adapters: Path, folder: Path, oracle: Oracle
):
    # A router without replicas runs, but is not ready.
    assert router.health() == 503
    with Client(router.address) as client, pytest.raises(UnavailableError, match="no replica"):
        client.generate("too early", max_new_tokens=1, timeout=60)

    first, second = start(model, adapters, folder, 0), start(model, adapters, folder, 1)
    with first, second:
        router.wait_until("loraplex_replicas", 2, seconds=120)
        assert router.health() == 200
        async with AsyncClient(router.address) as client:
            await each_adapter_is_on_one_replica(router, client)
            await one_replica_stops(router, client, first, oracle)
            first = start(model, adapters, folder, 0)
            with first:
                await asyncio.to_thread(router.wait_until, "loraplex_replicas", 2, 120)
                await one_replica_hangs(router, client, second, oracle)
                await one_replica_is_killed(router, client, second, oracle)
        router.assert_nothing_is_held()
        assert router.terminate() == 0


async def each_adapter_is_on_one_replica(router: Router, client: AsyncClient) -> None:
    names = "r1", "r4", "r8", "r16"
    for _ in range(3):
        await asyncio.gather(*(client.generate("Hi", adapter=name, max_new_tokens=4) for name in names))
    assert router.metric('loraplex_adapters{tier="device"}') == len(names)  # the sum over both replicas


async def one_replica_stops(router: Router, client: AsyncClient, stopping: Shard, oracle: Oracle) -> None:
    """SIGTERM to all its processes: running requests finish there, however long they take, new ones go to the other
    replica, and the shard exits with 0."""
    long = [client.stream(f"long {i}", max_new_tokens=LONG, ignore_eos=True) for i in range(2)]
    tokens_of_long = [len((await anext(stream)).tokens) for stream in long]  # one in each replica
    streams = [client.stream(f"{i}", max_new_tokens=100, ignore_eos=True) for i in range(4)]
    pieces = [[await anext(stream)] for stream in streams]
    stopping.terminate_with_all_it_started()
    await asyncio.to_thread(router.wait_until, "loraplex_replicas", 1)
    assert (await client.generate("meanwhile", adapter="r4", max_new_tokens=4)).text
    for number, (stream, seen) in enumerate(zip(streams, pieces, strict=True)):
        seen += [piece async for piece in stream]
        assert seen[-1].finish_reason is FinishReason.LENGTH
        tokens = [token.id for piece in seen for token in piece.tokens]
        assert tokens == oracle.generate(byte_tokenizer().encode(f"{number}"), None, 100)[0]
    for read, stream in zip(tokens_of_long, long, strict=True):
        assert read + sum([len(piece.tokens) async for piece in stream]) == LONG
    assert await asyncio.to_thread(stopping.process.wait, 30) == 0
    assert "ended" not in stopping.log


async def one_replica_hangs(router: Router, client: AsyncClient, stopped: Shard, oracle: Oracle) -> None:
    """SIGSTOP: running requests continue in the other replica. The shard is used again once it continues."""
    streams = [client.stream(f"{i}", max_new_tokens=100, ignore_eos=True) for i in range(4)]
    pieces = [[await anext(stream)] for stream in streams]
    stopped.process.send_signal(signal.SIGSTOP)
    for number, (stream, seen) in enumerate(zip(streams, pieces, strict=True)):
        seen += [piece async for piece in stream]
        tokens = [token.id for piece in seen for token in piece.tokens]
        assert tokens == oracle.generate(byte_tokenizer().encode(f"{number}"), None, 100)[0]
    await asyncio.to_thread(router.wait_until, 'loraplex_replica_losses_total{reason="silent"}', 1)
    assert (await client.generate("meanwhile", adapter="r4", max_new_tokens=4)).text
    stopped.process.send_signal(signal.SIGCONT)
    await asyncio.to_thread(router.wait_until, "loraplex_replicas", 2)


async def one_replica_is_killed(router: Router, client: AsyncClient, killed: Shard, oracle: Oracle) -> None:
    """SIGKILL: running requests continue in the other replica, from their last token."""
    names = [None, "r8"] * 2
    streams = [client.stream(f"{i}", adapter=name, max_new_tokens=100, ignore_eos=True) for i, name in enumerate(names)]
    pieces = [[await anext(stream)] for stream in streams]
    killed.process.kill()
    for number, (name, stream, seen) in enumerate(zip(names, streams, pieces, strict=True)):
        seen += [piece async for piece in stream]
        tokens = [token.id for piece in seen for token in piece.tokens]
        assert tokens == oracle.generate(byte_tokenizer().encode(f"{number}"), name, 100)[0]
    assert router.metric("loraplex_replicas") == 1
