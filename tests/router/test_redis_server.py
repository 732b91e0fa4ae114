"""Redis servers as people have them: one that another one takes over from, and clusters."""

import asyncio
import subprocess
from pathlib import Path

import pytest

from loraplex_protos.errors import UnavailableError
from loraplex_router.access.tenant import Allowance
from loraplex_router.journal.redis_store import RedisStore
from loraplex_router.store.redis_server import RedisServer
from loraplex_router.usage.event import Used
from loraplex_router.usage.ledger import Entry, today
from loraplex_router.usage.redis_ledger import RedisLedger
from tests.redis_server import redis_server
from tests.router.test_shared_limits import Router
from tests.tools import needs_redis


@needs_redis
async def test_the_server_that_takes_over_is_written_to(tmp_path: Path):
    former, later = tmp_path / "former", tmp_path / "later"
    for folder in (former, later):
        folder.mkdir()
    with redis_server(former) as (url, _), redis_server(later):
        name = tmp_path / "name"
        name.symlink_to(former / "redis")
        server, of_former = RedisServer(f"unix://{name}"), RedisServer(url)
        await server.run([("SET", "key", "of former")])
        await of_former.run([("REPLICAOF", "localhost", "1")])
        name.unlink()
        name.symlink_to(later / "redis")
        said = "the Redis server of --store fails: You can't write against a read only replica."
        with pytest.raises(UnavailableError, match=f"^{said}$"):
            await server.run([("SET", "key", "lost")])
        await server.run([("SET", "key", "of later")])
        assert await server.run([("GET", "key")]) == [b"of later"]
        for each in (server, of_former):
            await each.aclose()


@needs_redis
async def test_streams_usage_and_limits_are_kept_in_a_cluster(tmp_path: Path):
    with redis_server(tmp_path, "--cluster-enabled", "yes") as (url, _):
        socket = url.removeprefix("unix://")
        subprocess.run(["redis-cli", "-s", socket, "CLUSTER", "ADDSLOTSRANGE", "0", "16383"], check=True)
        router = Router(url, Allowance(max_requests=1), "acme", [1000.0])
        server = router.server
        while b"cluster_state:ok" not in (await server.run([("CLUSTER", "INFO")]))[0]:
            await asyncio.sleep(0.05)
        store = RedisStore(server, 60)
        assert await store.append({"one": b"1", "two": b"2"}, {"one": b"a", "two": b"b"}, {"one": "of one"}) == []
        assert await store.read("two") == b"b2"
        ledger = RedisLedger(server)
        entry = Entry(0, "account", "acme", "sql", Used(1, 10, 4, 5), stream="one")
        assert [counted.used for counted in await ledger.settle([entry])] == [entry.used]
        await ledger.told([entry])
        assert await ledger.totals([today()]) == {("acme", "sql"): entry.used}
        assert await router.begin() == "" and "requests at once" in await router.begin()
        await server.aclose()


@needs_redis
async def test_of_a_cluster_the_node_to_name_is_said(tmp_path: Path):
    nodes = (
        f"{'a' * 40} :0@0 myself,master - 0 0 1 connected",
        f"{'b' * 40} 127.0.0.2:1@2 master - 0 0 2 connected 0-16383",
        "vars currentEpoch 2 lastVoteEpoch 0",
    )
    (tmp_path / "nodes.conf").write_text("\n".join(nodes) + "\n")
    with redis_server(tmp_path, "--cluster-enabled", "yes") as (url, _):
        server = RedisServer(url)
        while b"cluster_state:ok" not in (await server.run([("CLUSTER", "INFO")]))[0]:
            await asyncio.sleep(0.05)
        with pytest.raises(UnavailableError, match=r"is a node of a cluster, of which 127\.0\.0\.2:1 has"):
            await server.run([("GET", "key")])
        await server.aclose()
