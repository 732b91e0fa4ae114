"""The router's own loops: one that fails costs neither the others nor the streams."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from loraplex_router import loops
from loraplex_router.app import Router
from loraplex_router.replicas.connections import Connections
from loraplex_router.replicas.replicas import Replicas
from loraplex_router.settings import RouterSettings
from loraplex_router.telemetry.request_log import RequestLog
from loraplex_router.telemetry.telemetry import Telemetry
from loraplex_router.wire.discovery import Address

SHARDS = ("unix:/nowhere/0", "unix:/nowhere/1")


def connections() -> Connections:
    telemetry = Telemetry(1, RequestLog(prompts=False))
    return Connections(RouterSettings(shards=SHARDS), Replicas(telemetry, 1.0), None, lambda model: None, telemetry)


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator["asyncio.Task[None]"]:
    """The work runs within the context, which lasts a minute at most."""
    task = asyncio.create_task(work)
    try:
        async with asyncio.timeout(60):
            yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_loop_that_fails_is_logged_and_begun_again_while_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loops, "AGAIN_SECONDS", 0.001)
    router = Router(RouterSettings(shards=SHARDS), None, Telemetry(1, RequestLog(prompts=False)))
    prefetching, others = [ZeroDivisionError("the first"), KeyError("the second")], list[asyncio.Task[None] | None]()
    again = asyncio.Event()

    async def fails() -> None:
        if prefetching:
            raise prefetching.pop(0)
        again.set()
        await asyncio.Event().wait()

    async def goes_on() -> None:
        others.append(asyncio.current_task())
        await asyncio.Event().wait()

    monkeypatch.setattr(router._prefetching, "run", fails)
    monkeypatch.setattr(router._usage, "run", goes_on)
    async with running(router._work(lambda names: None)) as work:
        await again.wait()
        assert not work.done() and len(others) == 1
    assert "ZeroDivisionError: the first" in caplog.text and "KeyError: 'the second'" in caplog.text


async def test_replicas_are_kept_while_the_search_for_others_fails_and_is_begun_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loops, "AGAIN_SECONDS", 0.001)
    found, connected, both = [SHARDS[:1], SHARDS], list[str](), asyncio.Event()

    class Discovery:
        def __init__(self, shards: tuple[str, ...]) -> None:
            pass

        async def watch(self) -> AsyncIterator[set[Address]]:
            yield {Address((name,)) for name in found.pop(0)}
            await asyncio.sleep(0)  # they are connected
            if found:
                raise ZeroDivisionError
            await asyncio.Event().wait()

    async def connect(self: Connections, address: Address) -> None:
        connected.append(str(address))
        if len(connected) == 2:
            both.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("loraplex_router.replicas.connections.Discovery", Discovery)
    monkeypatch.setattr(Connections, "_connect", connect)
    async with running(connections().run()):
        await both.wait()
    assert connected == list(SHARDS) and "ZeroDivisionError" in caplog.text


async def test_a_replica_whose_connection_fails_is_tried_again_while_the_others_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loops, "AGAIN_SECONDS", 0.001)
    monkeypatch.setattr("loraplex_router.replicas.connections.RETRY_SECONDS", 0.001)
    connected, again = list[str](), asyncio.Event()

    async def connect(self: Connections, address: Address) -> None:
        connected.append(str(address))
        if str(address) == SHARDS[1]:
            await asyncio.Event().wait()
        if connected.count(SHARDS[0]) == 3:
            again.set()
        raise (ZeroDivisionError if connected.count(SHARDS[0]) == 1 else FileNotFoundError)("tls.crt")

    monkeypatch.setattr(Connections, "_connect", connect)
    async with running(connections().run()) as work:
        await again.wait()
        assert connected.count(SHARDS[1]) == 1 and not work.done()
    assert "ZeroDivisionError" in caplog.text and f"replica {SHARDS[0]}: tls.crt" in caplog.text
