"""The registry file changed through the API: compare-and-swap, durable, and the same for every router that reads it."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn

import pytest

from loraplex_protos.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    AdapterSourceError,
    ForbiddenError,
    InvalidRequestError,
    UnavailableError,
)
from loraplex_protos.generation_pb2 import ADAPTER_STATE_LOADED as LOADED
from loraplex_protos.generation_pb2 import ADAPTER_STATE_REGISTERED as REGISTERED
from loraplex_router.access import replaced_file
from loraplex_router.access.keys import TenantSettings
from loraplex_router.adapters.registry_content import read_registry, write_registry
from loraplex_router.service.adapters import Adapters
from loraplex_router.vocabulary.references import AdapterReference
from tests.router.test_keys import ADMIN_KEY, OLD_KEY, hashed
from tests.router.test_registry import FILE, write
from tests.router.test_replicas import Cluster, request

A, B = AdapterReference("a", "local"), AdapterReference("b", "local")
DIGESTS = {"a": "a" * 64, "b": "b" * 64, "c": "c" * 64}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, "adapters: {sql: {1: {id: a, source: local}}}\naliases: {stable: sql@1}")


@pytest.fixture
async def cluster(path: Path) -> AsyncIterator[Cluster]:
    made = Cluster(registry_file=path)
    made.shards.digests.update(DIGESTS)
    yield made
    await made.close()


@pytest.fixture
def adapters(cluster: Cluster) -> Adapters:
    return cluster.service.adapters


@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_written_is_read_back(as_json: bool, tmp_path: Path) -> None:
    content = read_registry(write(tmp_path, FILE))
    assert read_registry(write(tmp_path, write_registry(content, as_json))) == content


async def test_a_file_of_json_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    path.write_text('{"adapters": {"sql": {"1": {"id": "a", "source": "local"}}}}')
    cluster = Cluster(registry_file=path)
    await cluster.service.adapters.set_alias("ünstable", {"sql": 100}, None)
    assert json.loads(path.read_text())["aliases"] == {"ünstable": {"sql": 100}}
    await cluster.close()


async def test_a_registered_adapter_is_the_newest_version_with_its_content_written_down(
    cluster: Cluster, adapters: Adapters, path: Path
):
    status = await adapters.register("sql", B, 1)
    assert (status.id, status.state, status.digest) == ("sql@2", LOADED, DIGESTS["b"])
    version = read_registry(path).names["sql"][2]
    assert (version.origin, version.digest) == (B, DIGESTS["b"])
    generation = await cluster.service.generate(request(1, 1, "sql"))
    await generation.collect()
    cluster.service.requests.close(generation)
    assert (generation.adapter_version, generation.adapter_digest) == ("sql@2", DIGESTS["b"])


async def test_a_version_is_registered_once_although_its_replica_is_lost_before_it_is_loaded(
    cluster: Cluster, adapters: Adapters, path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def lose(reference: AdapterReference) -> NoReturn:
        raise UnavailableError("the connection was closed")

    monkeypatch.setattr(cluster.replica.adapters, "read_again", lose)
    status = await adapters.register("sql", B, 1)
    assert (status.id, status.state, status.digest) == ("sql@2", REGISTERED, DIGESTS["b"])
    assert read_registry(path).names["sql"][2].digest == DIGESTS["b"]
    assert len(await cluster.answer(1, adapter="sql@2")) == 5


async def test_after_a_restart_other_content_under_the_same_id_is_refused(adapters: Adapters, path: Path):
    await adapters.register("sql", B, None)
    again = Cluster(registry_file=path)
    again.shards.digests["b"] = DIGESTS["c"]
    with pytest.raises(AdapterSourceError, match=DIGESTS["b"]):
        await again.service.generate(request(1, 1, "sql@2"))
    await again.close()


async def test_a_version_can_be_registered_under_another_name(adapters: Adapters, path: Path):
    await adapters.register("sql", B, None)
    await adapters.register("production", AdapterReference("stable"), 0)
    assert read_registry(path).names["production"][1].origin == A


async def test_of_two_that_expect_the_same_version_one_is_told(adapters: Adapters, path: Path):
    outcomes = await asyncio.gather(
        adapters.register("sql", B, 1), adapters.register("sql", AdapterReference("c"), 1), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes if isinstance(outcome, Exception)] == [AdapterConflictError]
    assert list(read_registry(path).names["sql"]) == [1, 2]


async def test_routers_that_share_the_file_do_not_undo_each_others_changes(adapters: Adapters, path: Path):
    other = Cluster(registry_file=path)
    other.shards.digests.update(DIGESTS)
    names = [f"name{number}" for number in range(8)]
    here, there = (each.register for each in (adapters, other.service.adapters))
    await asyncio.gather(*((here if number % 2 else there)(name, A, 0) for number, name in enumerate(names)))
    assert set(read_registry(path).names) == {"sql", *names}
    with pytest.raises(AdapterConflictError, match="has version 1 now"):
        await here(names[0], A, 0)
    await other.close()


async def test_an_alias_is_changed_only_if_it_is_as_expected(adapters: Adapters, path: Path):
    await adapters.register("sql", B, None)
    await adapters.set_alias("canary", {"sql@1": 95, "sql@2": 5}, {})
    with pytest.raises(AdapterConflictError, match=r"'canary' stands for sql@1 \(95 %\), sql@2 \(5 %\) now"):
        await adapters.set_alias("canary", {"sql@1": 50, "sql@2": 50}, {"sql@1": 100})
    await adapters.set_alias("canary", {"sql@1": 50, "sql@2": 50}, {"sql@1": 95, "sql@2": 5})
    assert read_registry(path).aliases["canary"] == {"sql@1": 50, "sql@2": 50}


@pytest.mark.parametrize(
    ("name", "targets", "fault"),
    [
        ("x", {"nothing": 100}, "^targets: the registry has no 'nothing'$"),
        ("x", {"sql@1": 90}, "^targets: the weights add up to 90"),
        ("x", {"sql@1": 200, "sql": -100}, "between 0 and 100"),
        ("x", {"sql": float("nan")}, "between 0 and 100"),
        ("x", {}, "add up to 0"),
        ("stable", {"stable": 100}, "^targets: they lead in a circle: stable -> stable$"),
        ("sql", {"stable": 100}, "^name: is a name in `adapters`, too"),
        ("a,b", {"sql": 100}, "^name: is not a valid name"),
    ],
)
async def test_an_alias_that_no_file_could_have_is_refused(
    adapters: Adapters, path: Path, name: str, targets: dict[str, float], fault: str
):
    before = path.read_text()
    with pytest.raises(InvalidRequestError, match=fault):
        await adapters.set_alias(name, targets, None)
    assert path.read_text() == before


async def test_what_is_removed_is_unknown_and_running_sequences_end_as_they_would(
    cluster: Cluster, adapters: Adapters, path: Path
):
    await adapters.register("sql", B, None)
    running = await cluster.service.generate(request(1, 150, "sql@1"))
    for name in ("sql@1", "sql"):
        with pytest.raises(AdapterConflictError, match=f"'{name}' cannot be removed while the alias 'stable' stands"):
            await adapters.remove(name, None)
    await adapters.set_alias("outer", {"stable": 100}, {})
    with pytest.raises(AdapterConflictError, match="the alias 'outer' stands"):
        await adapters.remove("stable", None)
    await adapters.remove("outer", None)
    with pytest.raises(AdapterConflictError, match="'stable' is an alias: use another name"):
        await adapters.register("stable", B, None)
    with pytest.raises(InvalidRequestError, match="expected_version: is of names with versions, and 'stable' is an"):
        await adapters.remove("stable", 1)
    await adapters.remove("stable", None)
    with pytest.raises(AdapterConflictError, match="newest version"):
        await adapters.remove("sql@2", None)
    await adapters.remove("sql@1", 2)
    (delta,) = await running.collect()
    assert len(delta.samples) == 150
    cluster.service.requests.close(running)
    with pytest.raises(AdapterNotFoundError, match="no 'sql@9'; its versions: 2"):
        await adapters.remove("sql@9", None)
    with pytest.raises(AdapterConflictError, match="has version 2 now, but should have version 1: somebody else"):
        await adapters.remove("sql", 1)
    await adapters.remove("sql", 2)
    assert not read_registry(path).names


async def test_an_interrupted_write_leaves_the_file_as_it_was(
    adapters: Adapters, path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = path.read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replaced_file.os, "fsync", full)
    with pytest.raises(UnavailableError, match="No space left"):
        await adapters.register("sql", B, None)
    assert path.read_text() == before


async def test_a_file_in_another_folder_is_written_where_its_link_leads(adapters: Adapters, path: Path):
    os.link(path, path.with_name("kept"))
    target = path.parent / "elsewhere" / "registry.yaml"
    target.parent.mkdir()
    path.rename(target)
    path.symlink_to(target)
    await adapters.register("sql", B, None)
    assert path.is_symlink() and 2 in read_registry(target).names["sql"]


async def test_a_file_that_is_wrong_is_not_overwritten(adapters: Adapters, path: Path):
    path.write_text("adapters: [")
    with pytest.raises(AdapterConflictError, match="the registry file is wrong, mend it first"):
        await adapters.register("sql", B, None)
    assert path.read_text() == "adapters: ["


async def test_only_administrators_change_it_and_only_if_there_is_one(path: Path):
    tenants = {
        "acme": TenantSettings(keys=[hashed(OLD_KEY)]),
        "operator": TenantSettings(keys=[hashed(ADMIN_KEY)], admin=True),
    }
    cluster = Cluster(tenants)
    for key, why in ((OLD_KEY, "administrator"), (ADMIN_KEY, "--adapter-registry")):
        with pytest.raises(ForbiddenError, match=why):
            await cluster.service.adapters.register("sql", A, None, key)
        with pytest.raises(ForbiddenError, match=why):
            await cluster.service.adapters.set_alias("x", {"sql": 100}, None, key)
    await cluster.close()
