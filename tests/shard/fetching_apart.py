"""Adapters are fetched in processes of their own, too: as by the rank itself, and without it. Run by
test_fetching_apart.py."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
import torch

from loraplex_protos.errors import AdapterError, AdapterInvalidError, OverloadedError
from loraplex_shard.lora.sources.files import CONFIG, TENSORS
from loraplex_shard.lora.sources.hub import HubSource
from loraplex_shard.lora.sources.local import LocalSource
from loraplex_shard.lora.sources.object_store import ObjectStoreSource
from loraplex_shard.lora.sources.patience import Progress
from loraplex_shard.lora.sources.protocol import Source
from loraplex_shard.lora.store import AdapterStore
from tests.shard.lora_models import BASE, layouts, save_adapter
from tests.stand_in_hub import StandInHub
from tests.stand_in_stores import StandInS3


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with StandInHub() as hub:
        yield hub


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInS3]:
    with StandInS3(monkeypatch) as s3:
        yield s3


def store_of(*sources: Source) -> AdapterStore:
    return AdapterStore(layouts(), torch.float32, torch.device("cpu"), BASE, sources)


def fetch_here(*_: object) -> None:
    pytest.fail("the rank has asked a source itself")


def test_what_is_fetched_apart_is_the_same_and_the_rank_learns_how_far_it_is(
    hub: StandInHub, s3: StandInS3, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("org/adapter", files)
    s3.push("bucket/adapter", files)
    apart = HubSource(hub.url, tmp_path / "hub"), ObjectStoreSource("s3://bucket", cache=tmp_path / "s3")
    expected = store_of(HubSource(hub.url, tmp_path / "here")).stage("org/adapter", "hub", "", "")
    hub.requests.clear()
    size = sum(map(len, files.values()))
    reports: list[tuple[str, int, int, str]] = []
    take = Progress.take

    def record(progress: Progress, done: int, total: int, trouble: str) -> None:
        take(progress, done, total, trouble)
        reports.append((progress.id, done, total, trouble))

    store = store_of(*apart)
    with closing(store.read_apart()):
        for source in apart:
            monkeypatch.setattr(source, "locate", fetch_here)
            monkeypatch.setattr(source, "fetch", fetch_here)
        monkeypatch.setattr(Progress, "take", record)
        hub.damaged = s3.damaged = 1
        for id, source in (("org/adapter", "hub"), ("adapter", "s3")):
            assert store.fetch(id, source, "").size == size
            assert store.count()["host"] == 0
            staged = store.stage(id, source, "", "")
            assert (staged.digest, staged.source, staged.text) == (expected.digest, source, expected.text)
            assert any("arrived damaged" in trouble for of, _, _, trouble in reports if of == id)
            assert reports[-1] == (id, size, size, "")
            store.unstage(staged.digest)
    assert store.fetches() == []
    arrived = [request.rpartition("/")[2] for request in hub.requests if request.startswith("GET /org")]
    assert sorted(arrived) == sorted([CONFIG, TENSORS, TENSORS])  # the damaged one twice, nothing again for `stage`


def test_errors_are_the_same_apart(hub: StandInHub, s3: StandInS3, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.push("org/gated", files, gated=True)
    hub.push("org/private", files, tokens=frozenset({"hf_secret"}))
    hub.push("org/cut", {**files, TENSORS: files[TENSORS][:-1]})
    stores = [
        store_of(
            ObjectStoreSource("s3://bucket", cache=tmp_path / f"s3-{n}"), HubSource(hub.url, tmp_path / f"hub-{n}")
        )
        for n in range(2)
    ]
    raised: list[list[tuple[type[AdapterError], str]]] = [[], []]
    with closing(stores[1].read_apart()):
        for store, errors in zip(stores, raised, strict=True):
            for id, token in (("org/none", ""), ("org/gated", ""), ("org/private", "wrong"), ("org/cut", "")):
                with pytest.raises(AdapterError) as error:
                    store.stage(id, "", "", token)
                errors.append((type(error.value), error.value.message))
            assert store.stage("org/private", "", "", "hf_secret").source == "hub"
            with pytest.raises(AdapterInvalidError, match=TENSORS):
                store.fetch("org/cut", "", "")
        assert raised[0] == raised[1]


def test_a_fetch_that_hangs_can_be_killed_and_holds_up_nobody(
    hub: StandInHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.push("org/adapter", files)
    save_adapter(tmp_path / "adapters" / "mine")
    hub.hang()
    store = store_of(LocalSource(tmp_path / "adapters"), HubSource(hub.url, tmp_path / "hub", timeout_s=600))
    with closing(store.read_apart()), ThreadPoolExecutor(64) as pool:
        hanging = [pool.submit(store.stage, f"org/{n}", "hub", "", "") for n in range(4)]
        while len(hub.requests) < len(hanging):
            time.sleep(0.001)
        assert store.stage("mine", "", "", "").source == "local"
        for process in _processes_of_stagers():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for call in hanging:
            with pytest.raises(OverloadedError, match="has been killed"):
                call.result()
        hub.release()
        assert store.stage("org/adapter", "hub", "", "").source == "hub"


def _processes_of_stagers() -> set[psutil.Process]:
    rank = psutil.Process()
    return set(rank.children(recursive=True)) - set(rank.children())
