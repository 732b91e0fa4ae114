"""Uploads that are kept beside the registry file: the same for every router that reads it, and after a restart."""

import asyncio
import os
import tarfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from loraplex_protos.errors import (
    AdapterConflictError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterSourceError,
    InvalidRequestError,
    LoraplexError,
    OverloadedError,
    UnavailableError,
)
from loraplex_protos.generation_pb2 import ADAPTER_STATE_AVAILABLE as AVAILABLE
from loraplex_router.access import followed_file, replaced_file
from loraplex_router.adapters import registry_file, upload_folder
from loraplex_router.adapters.registry_content import read_registry
from loraplex_router.adapters.upload_folder import LEFT, LEFT_SECONDS
from loraplex_router.vocabulary.references import AdapterReference
from tests.router.test_registry import write
from tests.router.test_replicas import Cluster, request
from tests.router.test_uploads import settled, upload


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, "adapters: {sql: {1: {id: a, source: local}}}")


@pytest.fixture
async def routers(path: Path) -> AsyncIterator[tuple[Cluster, Cluster]]:
    """Two routers with one registry file."""
    made = Cluster(registry_file=path), Cluster(registry_file=path)
    yield made
    for each in made:
        await each.close()


def kept(path: Path) -> list[Path]:
    return [file for file in sorted(folder(path).glob("*")) if file.suffix != LEFT]


def leaving(path: Path) -> list[Path]:
    """Uploads that the registry no longer names."""
    return sorted(folder(path).glob(f"*{LEFT}"))


def folder(path: Path) -> Path:
    return path.with_name(f"{path.name}.uploads")


async def served(cluster: Cluster, adapter: str, **options: object) -> tuple[str, str]:
    """The version and the digest that answer."""
    generation = await cluster.service.generate(request(1, 1, adapter, **options))
    await generation.collect()
    cluster.service.requests.close(generation)
    return generation.adapter_version, generation.adapter_digest


async def test_an_upload_is_the_same_for_a_router_that_starts_later(routers: tuple[Cluster, Cluster], path: Path):
    version = await upload(routers[0], b"one")
    expected = await served(routers[0], "policy")
    again = Cluster(registry_file=path)
    assert await served(again, "policy") == await served(again, f"policy@{version}") == expected
    assert read_registry(path).names["policy"][version].digest == expected[1]
    await again.close()


async def test_what_another_router_has_just_registered_is_known_at_once(routers: tuple[Cluster, Cluster]):
    here, there = routers  # neither follows the file
    version = await upload(here, b"one")
    expected = await served(here, "policy")
    names = "policy", f"policy@{version}", "policy"
    assert await asyncio.gather(*(served(there, name) for name in names)) == [expected] * 3
    version = await upload(here, b"two")
    assert await served(there, f"policy@{version}") == await served(here, "policy") != expected
    await here.service.adapters.set_alias("best", {f"policy@{version}": 100}, {})
    assert (await there.service.adapters.pin(AdapterReference("best"))).id == f"policy@{version}"


async def test_a_request_that_leaves_while_the_file_is_read_again_does_not_hide_the_change(
    routers: tuple[Cluster, Cluster], path: Path, monkeypatch: pytest.MonkeyPatch
):
    here, there = routers
    await upload(here, b"one")
    reading, left, reread = asyncio.Event(), asyncio.Event(), there.registry_file.reread

    async def read_late() -> None:
        reading.set()
        await left.wait()
        await reread()

    with monkeypatch.context() as patch:
        patch.setattr(there.registry_file, "reread", read_late)
        leaving = asyncio.create_task(served(there, "policy"))
        await reading.wait()
        leaving.cancel()
        await asyncio.wait([leaving])
        left.set()
    assert await served(there, "policy") == await served(here, "policy")
    write(path.parent, "adapters: {policy: {}}")
    await served(there, "not/registered")
    assert "adapters.policy" in there.registry.fault
    assert await served(there, "policy") == await served(here, "policy")


async def test_a_router_that_runs_learns_of_uploads_and_of_their_removal(
    routers: tuple[Cluster, Cluster], monkeypatch: pytest.MonkeyPatch
):
    here, there = routers
    monkeypatch.setattr(followed_file, "LOOK_SECONDS", 0.001)
    following = asyncio.create_task(there.registry_file.follow())

    async def until(version: int) -> None:
        async with asyncio.timeout(10):
            while (found := there.registry.find("policy")) is not None and found.number != version:
                await asyncio.sleep(0.001)

    for content in (b"one", b"two"):
        version = await upload(here, content)
        async with asyncio.timeout(10):
            while str(there.registry.find("policy")) != f"policy@{version}":
                await asyncio.sleep(0.001)
        assert await served(there, "policy") == await served(here, "policy")
    await here.service.adapters.remove("policy", version)
    async with asyncio.timeout(10):
        while there.registry.has("policy"):
            await asyncio.sleep(0.001)
    await settled(there, 0)
    following.cancel()


async def test_of_routers_that_expect_the_same_version_one_is_told(routers: tuple[Cluster, Cluster], path: Path):
    version = 0
    for number in range(5):
        contents = [b"%d here" % number, b"%d there" % number]
        racing = zip(routers, contents, strict=True)
        outcomes = await asyncio.gather(
            *(upload(each, content, expected=version) for each, content in racing), return_exceptions=True
        )
        assert [type(each) for each in outcomes if isinstance(each, Exception)] == [AdapterConflictError]
        (version,) = (each for each in outcomes if isinstance(each, int))
        assert list(read_registry(path).names["policy"]) == [version]
        assert len(kept(path)) == 1


async def test_a_version_is_expected_that_another_router_has_just_made(routers: tuple[Cluster, Cluster]):
    here, there = routers
    first = await upload(here, b"one", expected=0)
    second = await upload(there, b"two", expected=first)
    with pytest.raises(AdapterConflictError, match=f"has version {second} now"):
        await upload(here, b"three", expected=first)
    there.uploads._clock = lambda: 1.0
    assert await upload(there, b"three", expected=second) > second


async def test_after_a_router_whose_clock_was_ahead_the_others_take_uploads(routers: tuple[Cluster, Cluster]):
    here, there = routers
    here.uploads._clock = lambda: time.time() + 86_400
    first = await upload(here, b"one")
    assert await upload(there, b"two") > first


async def test_an_upload_that_an_alias_stands_for_is_kept_until_it_does_not(
    routers: tuple[Cluster, Cluster], path: Path
):
    here = routers[0]
    adapters = here.service.adapters
    first = await upload(here, b"one")
    await adapters.set_alias("canary", {f"policy@{first}": 50, "policy": 50}, {})
    second = await upload(here, b"two")
    answered = {await served(here, "canary", session=f"session {number}") for number in range(20)}
    assert {version for version, _ in answered} == {f"policy@{first}", f"policy@{second}"}
    assert len(kept(path)) == len({digest for _, digest in answered}) == 2
    with pytest.raises(AdapterConflictError, match="while the alias 'canary' stands for it"):
        await adapters.remove(f"policy@{first}", None)
    await adapters.set_alias("canary", {"policy": 100}, None)
    await upload(here, b"three")
    assert len(kept(path)) == 1
    with pytest.raises(AdapterConflictError, match="'canary' is an alias"):
        await upload(here, b"four", "canary")


async def test_an_upload_can_be_a_version_of_a_name_with_others_and_have_another_name(
    routers: tuple[Cluster, Cluster], path: Path
):
    here = routers[0]
    version = await upload(here, b"one", "sql", expected=1)
    assert set(read_registry(path).names["sql"]) == {1, version}
    await here.service.adapters.register("production", AdapterReference("sql"), 0)
    assert await upload(here, b"two", "sql") > version
    await here.service.adapters.remove("sql", None)
    assert (await served(here, "production"))[0] == "production@1"
    again = Cluster(registry_file=path)
    assert await served(again, "production") == await served(here, "production")
    assert len(kept(path)) == 1
    await again.close()


async def test_running_sequences_of_a_version_that_another_router_replaced_survive_their_replica(
    routers: tuple[Cluster, Cluster],
):
    here, there = routers
    await upload(here, b"one")
    await there.registry_file.reread()
    running = await there.service.generate(request(1, 100, "policy"))
    while running.outputs[0].generated < 5:
        await asyncio.sleep(0)
    await upload(here, b"two")
    await there.registry_file.reread()
    there.join("second")
    there.lose(there.replica)
    (delta,) = await running.collect()
    assert len(delta.samples) == 100
    there.service.requests.close(running)


async def test_a_router_that_does_not_know_yet_serves_what_another_one_replaced(routers: tuple[Cluster, Cluster]):
    here, there = routers
    version = await upload(here, b"one")
    await there.registry_file.reread()
    for content in (b"two", b"three"):
        await upload(here, content)
    assert (await served(there, "policy"))[0] == f"policy@{version}"
    await there.registry_file.reread()
    assert await served(there, "policy") == await served(here, "policy")


async def test_what_the_registry_no_longer_names_is_deleted_after_a_while(
    routers: tuple[Cluster, Cluster], path: Path, monkeypatch: pytest.MonkeyPatch
):
    here, there = routers
    for content in (b"one", b"two", b"three"):
        await upload(here, content)
    await upload(here, b"one", "other")
    await here.service.adapters.remove("other", None)
    assert (len(kept(path)), len(leaving(path))) == (1, 3)
    monkeypatch.setattr(followed_file, "LOOK_SECONDS", 0.001)
    following = asyncio.create_task(there.registry_file.follow())  # here might have died
    now = time.time()
    for file, age in zip(leaving(path), (0, LEFT_SECONDS - 60, LEFT_SECONDS + 60), strict=True):
        os.utime(file, (now - age, now - age))
    async with asyncio.timeout(10):
        while len(leaving(path)) > 2:  # when it starts, and some time after each change
            await asyncio.sleep(0.001)
        monkeypatch.setattr(registry_file, "LEFT_SECONDS", 0.1)
        monkeypatch.setattr(upload_folder, "LEFT_SECONDS", -1.0)
        await upload(here, b"one", "another")
        for name in ("another", "policy"):
            await here.service.adapters.remove(name, None)
        while leaving(path):
            await asyncio.sleep(0.001)
    assert not kept(path)
    following.cancel()


async def test_an_upload_that_the_registry_names_again_is_kept(routers: tuple[Cluster, Cluster], path: Path):
    here, there = routers
    await upload(here, b"one")
    expected, former = await served(here, "policy"), path.read_text()
    await upload(here, b"two")
    path.write_text(former)  # the operator puts an older file back
    await there.registry_file.reread()
    assert await served(there, "policy") == expected
    await upload(there, b"three", "other")
    assert len(kept(path)) == 3 and not leaving(path)
    again = Cluster(registry_file=path)
    assert await served(again, "policy") == expected
    await again.close()


async def test_an_upload_of_a_version_that_is_wrong_in_the_file_is_kept(routers: tuple[Cluster, Cluster], path: Path):
    version = await upload(routers[0], b"one")
    expected, good = await served(routers[0], "policy"), path.read_text()
    path.write_text(good.replace(expected[1], "typo"))
    for router in routers:
        await router.registry_file.reread()
    await upload(routers[1], b"two", "other")
    assert len(kept(path)) == 2
    assert read_registry(path).names["policy"][version].fault


async def test_what_was_replaced_takes_no_room_from_new_uploads(
    routers: tuple[Cluster, Cluster], path: Path, monkeypatch: pytest.MonkeyPatch
):
    here = routers[0]
    await upload(here, b"one")
    size = kept(path)[0].stat().st_size
    monkeypatch.setattr(here.registry_file.uploads, "_most", 4 * size)
    versions = [await upload(here, b"one") for _ in range(5)]
    assert sum(file.stat().st_size for file in kept(path) + leaving(path)) <= 4 * size
    assert len(leaving(path)) == 3  # the newest ones
    assert (await served(here, "policy"))[0] == f"policy@{versions[-1]}"

    replace, full = upload_folder.replace_file, OSError(28, "No space left on device")
    tries = iter([full])

    def replace_once_there_is_room(file: Path, write: Callable[[IO[bytes]], object]) -> os.stat_result:
        for error in tries:
            raise error
        assert not leaving(path)
        return replace(file, write)

    monkeypatch.setattr(upload_folder, "replace_file", replace_once_there_is_room)
    await upload(here, b"two", "other")
    assert len(kept(path)) == 2


async def test_uploads_take_no_descriptors(routers: tuple[Cluster, Cluster]):
    here, there = routers

    def descriptors() -> set[str]:
        found = set()
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):
                found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        return found

    for number in range(3):
        await upload(here, b"one", f"policy-{number}")
        await there.registry_file.reread()
        await served(there, f"policy-{number}")
    assert not [name for name in descriptors() if "uploads" in name]


async def test_uploads_take_no_more_of_the_disk_than_they_may(
    routers: tuple[Cluster, Cluster], path: Path, monkeypatch: pytest.MonkeyPatch
):
    here, there = routers
    monkeypatch.setattr(here.registry_file.uploads, "_most", 20_500)
    await upload(here, b"one")
    await upload(there, b"one", "other")
    with pytest.raises(OverloadedError, match="remove another one"):
        await upload(here, bytes(900), "third")
    await here.service.adapters.remove("other", None)
    monkeypatch.setattr(here.registry_file.uploads, "_most", 40_000)
    for _ in range(20):  # the memory is free again
        await upload(here, bytes(900), "third")
    assert len(kept(path)) == 2


async def test_what_cannot_be_served_or_written_leaves_nothing_behind(
    routers: tuple[Cluster, Cluster], path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(AdapterInvalidError):
        await upload(routers[0], b"broken")
    before = path.read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replaced_file.os, "fsync", full)
    with pytest.raises(UnavailableError, match="No space left"):
        await upload(routers[0], b"one")
    await settled(routers[0], 0)
    assert not kept(path) and path.read_text() == before


@pytest.mark.parametrize("damage", ["gone", "short", "changed", "not an archive"])
async def test_a_damaged_upload_is_refused_and_its_neighbours_answer(
    routers: tuple[Cluster, Cluster], path: Path, damage: str
):
    await upload(routers[0], b"one")
    await upload(routers[0], b"x" * 500, "damaged")
    (file,) = (each for each in kept(path) if b"xxx" in each.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "short":
        os.truncate(file, 700)
    else:
        file.write_bytes(b"hi" if damage == "not an archive" else file.read_bytes().replace(b"xx", b"yy"))
    again = Cluster(registry_file=path)
    with pytest.raises(AdapterSourceError, match=r"adapter damaged@\d+ of the registry: .*upload"):
        await again.service.generate(request(1, 1, "damaged"))
    assert await served(again, "policy") == await served(routers[0], "policy")
    await again.close()


async def test_what_a_router_that_died_left_is_deleted_later(
    routers: tuple[Cluster, Cluster], path: Path, monkeypatch: pytest.MonkeyPatch
):
    tomorrow = time.time() + 86400
    monkeypatch.setattr(time, "time", lambda: tomorrow)  # the folder's clock is another machine's
    version = await upload(routers[0], b"one")
    left, arriving = (path.with_name(f"{path.name}.uploads") / f"{digit * 32}.tar" for digit in "01")
    torn, note = left.with_name(f".{left.name}.new"), left.with_name("README")
    for each in (left, torn, arriving, note):
        each.touch()
    for each in (left, torn, note):
        os.utime(each, (1, 1))
    await upload(routers[1], b"two", "other")
    assert {arriving, note} < set(kept(path)) and not {left, torn} & set(kept(path))
    assert leaving(path) == [left.with_suffix(LEFT)]
    assert (await served(routers[1], f"policy@{version}"))[0] == f"policy@{version}"


async def test_the_files_of_an_upload_lie_in_an_archive_that_anyone_can_read(
    routers: tuple[Cluster, Cluster], path: Path
):
    await upload(routers[0], b"one")
    with tarfile.open(kept(path)[0]) as archive:
        assert archive.extractfile("adapter_model.safetensors").read() == b"one"


async def test_the_listing_says_that_an_upload_can_be_loaded(routers: tuple[Cluster, Cluster]):
    version = await upload(routers[0], b"one")
    await routers[1].registry_file.reread()
    (status,) = (s for s in (await routers[1].service.adapters.list()).adapters if s.id == f"policy@{version}")
    assert (status.source, status.state, len(status.digest)) == ("upload", AVAILABLE, 64)


async def test_with_a_file_that_cannot_be_written_uploads_are_in_memory(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry_file.os, "access", lambda *_: False)
    cluster = Cluster(registry_file=path)
    await upload(cluster, b"one")
    assert not kept(path)
    with pytest.raises(AdapterConflictError, match="declared in the registry file"):
        await upload(cluster, b"one", "sql")
    await cluster.service.adapters.remove("policy", None)
    with pytest.raises(AdapterNotFoundError):
        await cluster.service.adapters.remove("policy", None)
    await cluster.close()


@pytest.mark.parametrize("id", ["../../etc/passwd", "x", "A" * 32, "policy"])
def test_no_file_is_read_for_an_upload_without_an_uploads_id(tmp_path: Path, id: str) -> None:
    content = read_registry(write(tmp_path, f"adapters: {{x: {{1: {{id: '{id}', source: upload}}}}}}"))
    assert "is not" in content.names["x"][1].fault


async def test_no_request_names_an_uploads_file_itself(routers: tuple[Cluster, Cluster], path: Path):
    await upload(routers[0], b"one")
    with pytest.raises((InvalidRequestError, LoraplexError)):
        await routers[0].service.adapters.load(AdapterReference(kept(path)[0].stem, "upload"))
