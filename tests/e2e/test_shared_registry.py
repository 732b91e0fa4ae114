"""Two routers with one registry file: uploads and changes through either hold for both, and after both were killed."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from loraplex import AdapterConflictError, AdapterNotFoundError, Client, MergedAdapters
from tests.e2e.processes import Router, Shard
from tests.e2e.test_registry import OPTIONS, read


@pytest.fixture
def start(model: Path, adapters: Path, tmp_path: Path) -> Iterator[Callable[[int], Router]]:
    """Starts one of the routers; each has a replica of its own, which stays when the router is killed."""
    (tmp_path / "registry.yaml").write_text("adapters: {}")
    sockets = [f"unix:{tmp_path}/{number}" for number in range(2)]
    with ExitStack() as running:
        for socket in sockets:
            flags = f"--model={model}", f"--adapters={adapters}", f"--listen={socket}", "--kv-blocks=64", "--threads=1"
            running.enter_context(Shard(*flags))

        def start(number: int) -> Router:
            flags = f"--shards={sockets[number]}", f"--adapter-registry={tmp_path}/registry.yaml"
            router = running.enter_context(Router(*flags))
            router.wait_until("loraplex_replicas", 1, 120)
            return router

        yield start


def answer(client: Client, adapter: str) -> tuple[str, str, str]:
    found = client.generate("Hi", adapter=adapter, **OPTIONS)
    return found.adapter_version, found.adapter_digest, found.text


def until_same(clients: list[Client], adapter: str) -> tuple[str, str, str]:
    deadline = time.monotonic() + 60
    while True:
        try:
            answers = {answer(client, adapter) for client in clients}
        except AdapterNotFoundError:
            answers = set()
        if len(answers) == 1:
            return answers.pop()
        assert time.monotonic() < deadline, answers
        time.sleep(0.1)


def test_a_name_means_the_same_on_every_router_and_after_a_restart(
    start: Callable[[int], Router], adapters: Path
) -> None:
    routers = [start(0), start(1)]
    clients = [Client(router.address) for router in routers]
    contents = [read(adapters / name) for name in ("r4", "r12", "r16", "r8", "r64")]
    version = 0
    for number in range(4):

        def upload(client: Client, files: dict[str, bytes], expected: int = version) -> int | None:
            try:
                return int(client.upload_adapter("policy", files, expected_version=expected).id.partition("@")[2])
            except AdapterConflictError:
                return None

        with ThreadPoolExecutor(2) as threads:
            made = list(threads.map(upload, clients, contents[number : number + 2]))
        (version,) = (each for each in made if each is not None)
        assert until_same(clients, "policy")[0] == f"policy@{version}"
    first = until_same(clients, "policy")
    clients[1].set_alias("stable", {first[0]: 100}, expected={})
    latest = clients[0].upload_adapter("policy", contents[0], expected_version=version)
    expected = {name: until_same(clients, name) for name in ("policy", "stable")}
    assert expected == {"policy": answer(clients[0], latest.id), "stable": first}
    merged = MergedAdapters(["policy", "r4"])  # the same content, twice
    assert clients[1].generate("Hi", adapter=merged, **OPTIONS).sequences
    assert expected["policy"][2] == clients[1].generate("Hi", adapter="r4", **OPTIONS).text
    for router, client in zip(routers, clients, strict=True):
        client.close()
        router.kill()
    with Client(start(1).address) as client:
        assert {name: answer(client, name) for name in expected} == expected
