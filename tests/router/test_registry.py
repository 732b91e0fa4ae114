"""The registry: names with versions and aliases, from a file that is followed, in requests, answers and listings."""

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import re
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loraplex_protos.adapter_names import is_id
from loraplex_protos.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterSourceError,
    ForbiddenError,
    InvalidRequestError,
    UnavailableError,
)
from loraplex_protos.generation_pb2 import ADAPTER_STATE_ALIAS as ALIAS
from loraplex_protos.generation_pb2 import ADAPTER_STATE_AVAILABLE as AVAILABLE
from loraplex_protos.generation_pb2 import ADAPTER_STATE_FAILED as FAILED
from loraplex_protos.generation_pb2 import ADAPTER_STATE_LOADED as LOADED
from loraplex_protos.generation_pb2 import ADAPTER_STATE_REGISTERED as REGISTERED
from loraplex_protos.generation_pb2 import AdapterStatus
from loraplex_router.access import followed_file, read_beside
from loraplex_router.access.keys import TenantSettings
from loraplex_router.adapters import registry_file, registry_process
from loraplex_router.adapters.registry import Registered, Registry
from loraplex_router.adapters.registry_content import RegistryFileError, read_registry
from loraplex_router.adapters.registry_file import RegistryFile
from loraplex_router.vocabulary.adapter import LocalAdapter, StagedAdapter
from loraplex_router.vocabulary.references import AdapterReference, MergedReference
from loraplex_router.vocabulary.request import Request
from tests.router.test_engine import Setup
from tests.router.test_keys import ADMIN_KEY, OLD_KEY, hashed
from tests.router.test_replicas import Cluster, request

FILE = """
adapters:
  sql:
    1: {id: a, source: local}
    2: {id: acme/sql, source: hub, revision: 9ab07e4}
  a:
    7: {id: b}
aliases:
  stable: sql@1
  canary: {sql@1: 95, sql: 5}
  nested: {canary: 50, a: 50}
"""


def write(path: Path, text: str = FILE) -> Path:
    new = path / "new"
    new.write_text(text)
    return new.replace(path / "registry.yaml")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry()
    made.update(read_registry(write(tmp_path)))
    return made


@pytest.fixture
async def cluster(registry: Registry) -> AsyncIterator[Cluster]:
    made = Cluster(
        {
            "acme": TenantSettings(keys=[hashed(OLD_KEY)], adapters=["sql", "canary"]),
            "operator": TenantSettings(keys=[hashed(ADMIN_KEY)], admin=True),
        }
    )
    made.registry.update(registry.content)
    yield made
    await made.close()


async def listed(cluster: Cluster, key: str = ADMIN_KEY) -> dict[str, list[AdapterStatus]]:
    found: dict[str, list[AdapterStatus]] = {}
    for status in (await cluster.service.adapters.list(key)).adapters:
        found.setdefault(status.id, []).append(status)
    return found


@pytest.mark.parametrize(
    ("asked", "version", "origin"),
    [
        ("sql", "sql@2", AdapterReference("acme/sql", "hub", "9ab07e4", "secret")),
        ("sql@1", "sql@1", AdapterReference("a", "local", token="secret")),
        ("stable", "sql@1", AdapterReference("a", "local", token="secret")),
        ("a", "a@7", AdapterReference("b", token="secret")),
    ],
)
def test_a_name_an_alias_or_a_version_stands_for_one_version(
    registry: Registry, asked: str, version: str, origin: AdapterReference
) -> None:
    found = registry.resolve_one(AdapterReference(asked, token="secret"), "me")
    assert (found.id, found.asked, found.origin) == (version, asked, origin)


@pytest.mark.parametrize("id", ["b", "org/name", "b@2", "unknown@1"])
def test_what_is_not_registered_is_left_to_the_sources(registry: Registry, id: str) -> None:
    assert registry.resolve_one(AdapterReference(id), "me") == AdapterReference(id)


def test_a_request_that_names_a_source_passes_by_the_registry(registry: Registry) -> None:
    assert registry.resolve_one(AdapterReference("a", "local"), "me") == AdapterReference("a", "local")


@pytest.mark.parametrize("id", ["sql@3", "sql@", "sql@1@1", "sql@x", "sql@²", "sql@" + "9" * 30])
def test_a_version_that_a_name_does_not_have_is_refused_with_those_it_has(registry: Registry, id: str) -> None:
    with pytest.raises(AdapterNotFoundError, match="its versions: 1, 2"):
        registry.resolve_one(AdapterReference(id), "me")


def test_a_revision_of_a_registered_name_is_refused(registry: Registry) -> None:
    with pytest.raises(InvalidRequestError, match="NAME@VERSION"):
        registry.resolve_one(AdapterReference("sql", revision="main"), "me")


def test_weights_are_shares_of_sessions(registry: Registry) -> None:
    chosen = Counter(registry.resolve_one(AdapterReference("canary"), f"session {i}").id for i in range(4000))
    assert chosen.keys() == {"sql@1", "sql@2"}
    assert 0.03 < chosen["sql@2"] / chosen.total() < 0.07


@given(st.text())
def test_a_session_keeps_its_version_on_every_router_and_while_its_share_grows(session: str) -> None:
    def chosen(*shares: int) -> str:
        names = [f"x@{number + 1}" for number in range(len(shares))]
        registry = Registry()
        registry.update(registry_of(dict(zip(names, shares, strict=True))))
        return registry.resolve_one(AdapterReference("alias"), session).id

    first, again, later = chosen(50, 30, 20), chosen(50, 30, 20), chosen(30, 50, 20)
    assert first == again
    assert first != "x@2" or later == "x@2"
    assert chosen(60, 40) in (chosen(50, 50), "x@1")


def test_the_parts_of_a_merged_adapter_are_resolved_each(registry: Registry) -> None:
    parts = AdapterReference("sql"), AdapterReference("b")
    merged = registry.resolve(MergedReference(parts), "me", lambda origin_id: True)
    assert [part.id for part in merged.adapters] == ["sql@2", "b"]


def registry_of(targets: dict[str, float]):
    versions = {number: {"id": "a"} for number in (1, 2, 3)}
    return read_content({"adapters": {"x": versions}, "aliases": {"alias": targets}})


def read_content(content: object):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "registry.json")
        path.write_text(json.dumps(content))
        return read_registry(path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("adapters: {x: {1: {id: a}}}\naliases: {y: z}", r"aliases\.y: the registry has no 'z'"),
        ("adapters: {x: {1: {id: a}}}\naliases: {y: x@2}", r"aliases\.y: 'x' has no version '2'"),
        ("adapters: {x: {1: {id: a}}}\naliases: {y: x@01}", r"aliases\.y: 'x' has no version '01'"),
        ("aliases: {y: y}", "aliases: they lead in a circle: y -> y"),
        ("aliases: {y: z, z: {y: 100}}", "aliases: they lead in a circle"),
        ("adapters: {x: {1: {id: a}}}\naliases: {y: {x@1: 60, x: 30}}", r"aliases\.y: the weights add up to 90"),
        ("adapters: {x: {1: {id: a}}}\naliases: {y: {x: 0}}", r"aliases\.y"),
        ("adapters: {x: {1: {id: a}}}\naliases: {y: {x: .nan}}", r"aliases\.y"),
        ("adapters: {x: {1: {id: a}}}\naliases: {y: {}}", r"aliases\.y"),
        ("adapters: {x: {1: {id: a}}}\naliases: {x: x@1}", r"aliases\.x: is a name in `adapters`, too"),
        ("adapters: {x: {}}", r"adapters\.x"),
        ("adapters: {x: {0: {id: a}}}", r"adapters\.x\.0"),
        ("adapters: {x: {latest: {id: a}}}", r"adapters\.x\.latest"),
        ("adapters: {x: {1: {}}}", r"adapters\.x\.1\.id: Field required"),
        ("adapters: {x: {1: {id: a, revison: b}}}", r"adapters\.x\.1\.revison: Extra inputs"),
        ("adapters: {x: {1: {id: a, revision: 1234567}}}", r"adapters\.x\.1\.revision: Input should be a valid string"),
        ("adapters: {x@1: {1: {id: a}}}", r"adapters\.x@1: is not a valid name"),
        ("adapters: {'x,y': {1: {id: a}}}", r"adapters\.x,y: is not a valid name"),
        ("adapters:\n  x: {1: {id: a}}\n  x: {1: {id: b}}", "line 2: 'x' is there twice"),
        ("adapters: {x: {1: {id: a}, 1: {id: b}}}", "'1' is there twice"),
        ("adapters: [", "is not YAML in line"),
        (
            "adapters:\n  x: {1: {id: a, revision: 2026-02-30}}",
            "in line 2: a value is read as !!timestamp, .* in quotes",
        ),
        (
            "adapters: {x: {1: {id: a, revision: !!bool maybe}}}",
            "in line 1: a value is read as !!bool, which it is not",
        ),
        ("adapters: " + "[" * 200_000, "is not YAML: it is nested too deeply"),
        ("adapters: !!python/object/apply:os.system [ls]", "is not YAML in line 1"),
        ("- x", "the file: "),
        ("adapters: {x: {1: a}}", r"adapters\.x\.1: Input should be a valid dictionary$"),
        ("\n", "it is empty: write `adapters: {}`"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(RegistryFileError, match=fault):
        read_registry(write(tmp_path, text))


@pytest.mark.parametrize(
    ("origin", "fault"),
    [
        ("{id: ../a}", "its id '../a' is not valid: a part begins with a dot"),
        ("{id: s3://bucket/../a, source: s3}", "its id 's3://bucket/../a' is not valid"),
        ("{id: 's3:/a//b'}", "its id 's3:/a//b' is not valid"),
        ("{id: a, digest: abc}", "its digest 'abc' is not 64 characters of 0-9 a-f"),
        ("{id: policy, source: upload}", "its id 'policy' is not an upload's"),
    ],
)
async def test_a_version_that_can_never_be_served_is_named_with_its_line_and_the_others_are_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, origin: str, fault: str
) -> None:
    text = (
        f"adapters:\n  sql: {{1: {{id: a}}}}\n  wrong:\n    1: {{id: a}}\n    2: {origin}\naliases: {{new: wrong@2}}\n"
    )
    setup = Setup(registry_file=write(tmp_path, text))
    engine = asyncio.create_task(setup.engine.run())
    assert "line 5 of the registry file: " + fault in caplog.text
    for name in ("sql", "wrong@1"):
        assert len(await setup.answer(1, adapter=name)) == 5
    for name in ("wrong", "wrong@2", "new"):
        with pytest.raises(AdapterInvalidError, match=re.escape("of the registry cannot be served: line 5 ")):
            await setup.answer(1, adapter=name)
    ((status,), _) = await setup.service.adapters.list(only="wrong@2")
    assert status.state == FAILED and fault in status.reason
    await setup.service.adapters.set_alias("other", {"sql": 100.0}, None)  # its line stays as it is
    assert fault in read_registry(tmp_path / "registry.yaml").names["wrong"][2].fault
    engine.cancel()


@pytest.mark.parametrize("text", [FILE, FILE.replace("id: a,", "id: ../a,"), "aliases: {y: z}"])
def test_a_long_file_is_read_in_a_process_of_its_own_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = write(tmp_path, text)

    def read(by: Callable[[Path], Registered]) -> object:
        try:
            return by(path)
        except RegistryFileError as error:
            return error.message

    monkeypatch.setattr(read_beside, "SHORT", 0)
    assert read(registry_process.read_registry_beside) == read(read_registry)

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(read_beside.subprocess, "run", refuse)  # a limit on processes is reached
    assert read(registry_process.read_registry_beside) == read(read_registry)


async def test_a_change_costs_the_event_loop_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    monkeypatch.setattr(
        registry_file, "read_registry_beside", lambda path: [reads.append(path), read_registry(path)][1]
    )
    many = "".join(f"\n  name-{number:03}: {{1: {{id: a}}}}" for number in range(100))
    setup = Setup(registry_file=write(tmp_path, f"adapters:{many}\n"))
    file, registry = setup.registry_file, setup.registry
    former = registry.content.names
    await setup.service.adapters.set_alias("mine", {"name-007": 100.0}, None)
    await file.look()
    assert len(reads) == 1  # what this router writes it need not read
    assert registry.content.names["name-007"] is former["name-007"] and "mine" in registry.content.aliases
    write(tmp_path, f"adapters:{many}\n  new: {{1: {{id: b}}}}\n")
    await file.look()
    assert len(reads) == 2 and registry.content.names.keys() - former.keys() == {"new"}
    assert all(registry.content.names[name] is former[name] for name in former)


async def test_a_disk_that_hangs_keeps_only_those_waiting_who_ask_for_unknown_names_and_not_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_file, "WAIT_SECONDS", 0.05)
    setup, goes_on = Setup(registry_file=write(tmp_path, "adapters: {old: {1: {id: a}}}")), threading.Event()
    file, state = setup.registry_file, setup.registry_file._file.state
    monkeypatch.setattr(file._file, "state", lambda: [goes_on.wait(60), state()][1])
    write(tmp_path, "adapters: {old: {1: {id: a}}, new: {1: {id: b}}}")
    try:
        async with asyncio.timeout(60):
            await asyncio.gather(*(file.look() for _ in range(100)))
            assert await asyncio.to_thread(lambda: 1) == 1  # others' threads are free
            assert setup.registry.find("old") and not setup.registry.find("new")
    finally:
        goes_on.set()
    async with asyncio.timeout(60):
        while not setup.registry.find("new"):
            await file.look()


async def test_a_router_that_keeps_the_registry_locked_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_file, "LOCK_SECONDS", 0.1)
    path = write(tmp_path, "adapters: {sql: {1: {id: a}}}")
    adapters = Setup(registry_file=path).service.adapters
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UnavailableError, match="another router has kept the registry file locked"):
            await adapters.set_alias("mine", {"sql": 100.0}, None)
    await adapters.set_alias("mine", {"sql": 100.0}, None)


def test_a_file_of_comments_is_an_empty_registry(tmp_path: Path) -> None:
    assert not read_registry(write(tmp_path, "# nothing yet\n")).names


async def test_answers_say_which_version_they_came_from(cluster: Cluster):
    generation = await cluster.service.generate(request(1, 3, "stable"), ADMIN_KEY)
    await generation.collect()
    cluster.service.requests.close(generation)
    assert (generation.adapter_version, generation.adapter_digest) == ("sql@1", "digest of a")
    assert generation.reference.asked == "stable"


async def test_permissions_are_for_names_whatever_the_version(cluster: Cluster):
    for name in ("sql", "sql@1", "canary"):
        generation = await cluster.service.generate(request(1, 1, name), OLD_KEY)
        await generation.collect()
        cluster.service.requests.close(generation)
    for name in ("a", "a@7", "a@8", "stable"):
        with pytest.raises(ForbiddenError):
            await cluster.service.generate(request(1, 1, name), OLD_KEY)
    assert set(await listed(cluster, OLD_KEY)) == {"sql", "sql@1", "sql@2", "canary"}


async def test_all_that_one_call_asks_for_gets_the_same_version(cluster: Cluster):
    asked = request(1, 1, "nested", n=8, session="one")
    generation = await cluster.service.generate(asked, ADMIN_KEY)
    await generation.collect()
    cluster.service.requests.close(generation)
    again = await cluster.service.generate(asked, ADMIN_KEY)
    await again.collect()
    cluster.service.requests.close(again)
    assert again.adapter_version == generation.adapter_version


async def test_the_listing_has_versions_aliases_and_what_they_hide(cluster: Cluster):
    found = await listed(cluster)
    assert [status.state for status in found["a"]] == [ALIAS, AVAILABLE]
    assert "request this one with the source local" in found["a"][1].warnings[0]
    assert {target.adapter: target.percent for target in found["canary"][0].targets} == {"sql@1": 95, "sql": 5}
    assert (found["sql@2"][0].state, found["sql@2"][0].revision) == (REGISTERED, "9ab07e4")
    status = await cluster.service.adapters.load(AdapterReference("stable"), ADMIN_KEY)
    assert (status.id, status.state, status.digest) == ("sql@1", LOADED, "digest of a")
    assert [status.state for status in (await listed(cluster))["sql@1"]] == [LOADED]
    await cluster.service.adapters.unload(AdapterReference("sql@1"), key=ADMIN_KEY)
    assert [status.state for status in (await listed(cluster))["sql@1"]] == [AVAILABLE]


async def test_what_the_registry_hides_is_counted_apart(cluster: Cluster):
    for reference in AdapterReference("sql@1"), AdapterReference("a", "local"), AdapterReference("sql@1", "local"):
        generation = await cluster.service.generate(Request(prompt=(1,), adapter=reference), ADMIN_KEY)
        cluster.service.requests.close(generation)
        label = f"[local]{reference.id}" if reference.source else reference.id
        assert generation.adapter_name == label and is_id(label) != bool(reference.source)


async def test_an_administrator_must_say_which_of_an_aliass_adapters_is_meant(cluster: Cluster):
    with pytest.raises(InvalidRequestError, match="name one of sql@1, sql"):
        await cluster.service.adapters.load(AdapterReference("canary"), ADMIN_KEY)


async def test_content_that_is_not_the_registrys_is_refused(cluster: Cluster):
    digest = "0" * 64
    cluster.registry.update(read_content({"adapters": {"x": {1: {"id": "a", "digest": digest}}}}))
    with pytest.raises(AdapterSourceError, match=f"the registry says that x@1 has the digest {digest}"):
        await cluster.service.generate(request(1, 1, "x"), ADMIN_KEY)
    assert [status.digest for status in (await listed(cluster))["x@1"]] == [digest]


async def test_a_version_whose_source_lacks_it_is_the_operators_mistake(cluster: Cluster):
    cluster.registry.update(read_content({"adapters": {"x": {1: {"id": "absent"}}}}))
    with pytest.raises(AdapterNotFoundError, match=r"^adapter x@1 of the registry: no absent$"):
        await cluster.service.generate(request(1, 1, "x"), ADMIN_KEY)


async def test_an_error_about_one_of_several_adapters_to_be_merged_names_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    async def stage(reference: AdapterReference) -> StagedAdapter:
        if reference.id in errors:
            raise errors[reference.id]
        return await staged(reference)

    shards = cluster.replica.shards
    errors = {"broken": AdapterInvalidError("it has no weights"), "slow": AdapterSourceError("the hub is busy")}
    errors |= {"bee": AdapterNotFoundError("the hub has no 'bee'")}
    staged = shards.stage
    monkeypatch.setattr(shards, "stage", stage)
    shards.local = [LocalAdapter("a"), LocalAdapter("beer")]
    declared = {"lost": {1: {"id": "absent"}}, "bad": {1: {"id": "broken"}}}
    cluster.registry.update(read_content({"adapters": declared}))
    for id, message in (
        ("broken", "adapter 'broken': it has no weights"),
        ("slow", "adapter 'slow': the hub is busy"),
        ("bee", "the hub has no 'bee'; did you mean 'beer'?"),
        ("lost", "adapter lost@1 of the registry: no absent"),
        ("bad", "adapter bad@1 of the registry: it has no weights"),
    ):
        merged = MergedReference((AdapterReference("a"), AdapterReference(id)))
        with pytest.raises(AdapterError) as refusal:
            await cluster.service.generate(Request(prompt=(1,), adapter=merged, max_new_tokens=1), ADMIN_KEY)
        assert refusal.value.message == message


async def test_running_sequences_keep_a_version_that_leaves_the_registry(cluster: Cluster):
    running = await cluster.service.generate(request(1, 150, "sql@1"), ADMIN_KEY)
    gone = cluster.registry.update(read_content({"adapters": {"sql": {2: {"id": "acme/sql"}}}}))
    assert [version.id for version in gone] == ["sql@1", "sql@2", "a@7"]  # version 2 has another origin
    for version in gone:
        cluster.administration.retire(version)
    with pytest.raises(AdapterNotFoundError):
        await cluster.service.generate(request(1, 1, "sql@1"), ADMIN_KEY)
    (delta,) = await running.collect()
    assert len(delta.samples) == 150
    cluster.service.requests.close(running)
    async with asyncio.timeout(5):
        while cluster.holders("digest of a"):
            await asyncio.sleep(0)


async def test_a_changed_file_is_taken_up_and_a_wrong_one_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Cluster, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(followed_file, "LOOK_SECONDS", 0.001)
    cluster.telemetry.metrics.watch_registry(lambda: bool(cluster.registry.fault))
    file = RegistryFile(write(tmp_path), cluster.registry, cluster.administration.retire, 0)
    following = asyncio.create_task(file.follow())

    async def until(fault: bool) -> None:
        async with asyncio.timeout(10):
            while bool(cluster.registry.fault) is not fault:
                await asyncio.sleep(0.001)

    write(tmp_path, "adapters: {sql: {3: {id: b}}}\naliases: {gone: nowhere}")
    await until(fault=True)
    assert cluster.registry.find("sql").number == 2
    assert "aliases.gone: the registry has no 'nowhere'" in caplog.text
    assert b"loraplex_adapter_registry_refused 1.0" in await cluster.telemetry.scrape()
    assert "aliases.gone" in (await listed(cluster))["sql"][0].warnings[0]
    assert "aliases.gone" not in (await listed(cluster, OLD_KEY))["sql"][0].warnings[0]
    write(tmp_path, "adapters: {sql: {3: {id: b}}}")
    await until(fault=False)
    assert cluster.registry.find("sql").number == 3
    assert b"loraplex_adapter_registry_refused 0.0" in await cluster.telemetry.scrape()
    following.cancel()


async def test_a_change_whose_caller_leaves_is_taken_up_like_one_of_another_router(tmp_path: Path, cluster: Cluster):
    file = RegistryFile(write(tmp_path), cluster.registry, cluster.administration.retire, 0)
    begun, left = threading.Event(), threading.Event()

    def edit(content: Registered) -> Registered:
        begun.set()
        left.wait(10)
        return replace(content, names={**content.names, "new": content.names["sql"]})

    change = asyncio.create_task(file.change(edit))
    await asyncio.to_thread(begun.wait, 10)
    change.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await change
    left.set()
    async with asyncio.timeout(10):
        while "new" not in cluster.registry.content.names:
            await asyncio.sleep(0.01)
            await file.look()


async def test_a_request_of_several_adapters_names_them_as_asked(cluster: Cluster):
    asked = Request((1,), adapters=(AdapterReference("stable"), None), max_new_tokens=1)
    generations = await cluster.service.generate_each(asked, ADMIN_KEY)
    assert [generation.adapter_version for generation in generations] == ["sql@1", ""]
    for generation in generations:
        await generation.collect()
        cluster.service.requests.close(generation)


@pytest.mark.parametrize("kept", ["{id: a, source: local}", None])
async def test_a_pinned_name_whose_new_version_cannot_be_served_is_followed_when_it_can(
    tmp_path: Path, kept: str | None
):
    def text(second: str) -> str:
        return "adapters:\n  sql:\n" + (f"    1: {kept}\n" if kept else "") + f"    2: {second}\n"

    def pinned() -> set[str]:
        return {
            entry.id
            for entry in cluster.resolutions
            for each in cluster.holders(entry.digest)
            if each.pool.get(entry.digest).pinned
        }

    cluster = Cluster(registry_file=write(tmp_path, "adapters: {sql: {1: {id: a, source: local}}}"))
    file = cluster.registry_file
    await cluster.administration.pin(cluster.registry.resolve_one(AdapterReference("sql"), None))
    write(tmp_path, text("{id: b, digest: 5f3c}"))
    await file.look()
    assert not cluster.registry.fault and cluster.registry.find("sql").number == 2
    assert len(await cluster.answer(1, adapter="c")) == 5  # other names are served
    write(tmp_path, text("{id: b}"))
    await file.look()
    cluster.administration.follow_pins()
    while cluster.administration._working:
        await asyncio.sleep(0)
    assert pinned() == {"sql@2"}
    await cluster.close()


async def test_a_pin_moves_with_the_alias_that_was_pinned_and_stays_with_a_version(cluster: Cluster):
    async def pinned(asked: str) -> list[str]:
        """What is pinned after `asked` was, and the alias has moved on."""
        await cluster.administration.pin(cluster.registry.resolve_one(AdapterReference(asked), None))
        cluster.registry.update(read_content(yaml.safe_load(FILE.replace("stable: sql@1", "stable: sql@2"))))
        cluster.administration.follow_pins()
        while cluster.administration._working:
            await asyncio.sleep(0)
        found = [status.id for status in (await cluster.administration.listing.page()).adapters if status.pinned]
        cluster.administration.unpin(cluster.registry.resolve_one(AdapterReference(found[0]), None))
        return found

    assert await pinned("sql@1") == ["sql@1"]
    cluster.registry.update(read_content(yaml.safe_load(FILE)))
    assert await pinned("stable") == ["sql@2"]
