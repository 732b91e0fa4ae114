"""Adapters from a hub: revisions, tokens, downloads and errors."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from loraplex_protos.errors import (
    AdapterError,
    AdapterForbiddenError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterSourceError,
)
from loraplex_shard.lora.sources import patience
from loraplex_shard.lora.sources.files import CONFIG, PICKLE, TENSORS
from loraplex_shard.lora.sources.hub import HubSource
from loraplex_shard.lora.sources.local import LocalSource
from loraplex_shard.lora.sources.patience import Progress
from loraplex_shard.lora.store import AdapterStore, StagedAdapter
from tests.shard.lora_models import BASE, layouts
from tests.stand_in_hub import StandInHub

TOKEN, OTHER_TOKEN = "hf_ofTheOwner", "hf_ofSomeoneElse"

NewStore = Callable[..., AdapterStore]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with StandInHub() as hub:
        yield hub


@pytest.fixture
def new_store(hub: StandInHub, tmp_path: Path) -> NewStore:
    """Makes a store that shares nothing with other stores except the files on disk."""

    def make(directory: Path | None = None, timeout_s: float = 10.0) -> AdapterStore:
        source = HubSource(hub.url, tmp_path / "cache", timeout_s)
        sources = [*([LocalSource(directory)] if directory else []), source]
        return AdapterStore(layouts(), torch.float32, torch.device("cpu"), BASE, sources)

    return make


@pytest.fixture
def store(new_store: NewStore) -> AdapterStore:
    return new_store()


def stage(store: AdapterStore, id: str = "org/adapter", revision: str = "", token: str = "") -> StagedAdapter:
    return store.stage(id, "hub", revision, token)


def downloads(hub: StandInHub) -> list[str]:
    return sorted(request.rpartition("/")[2] for request in hub.requests if request.startswith("GET /org"))


def test_only_the_two_files_are_fetched_and_the_commit_is_reported(
    hub: StandInHub, store: AdapterStore, files: dict[str, bytes]
) -> None:
    commit = hub.push("org/adapter", {**files, "README.md": b"# hello", PICKLE: b"x", "optimizer.pt": b"x"})
    staged = stage(store)
    assert (staged.source, staged.revision, staged.lora_rank) == ("hub", commit, 4)
    assert downloads(hub) == sorted([CONFIG, TENSORS])
    store.load(staged.digest, 1)


def test_the_url_of_a_repository_is_accepted_as_its_name(
    hub: StandInHub, store: AdapterStore, files: dict[str, bytes]
) -> None:
    hub.push("org/adapter", files)
    for address in (f"{hub.url}/org/adapter", "https://huggingface.co/org/adapter", "hf://org/adapter"):
        assert store.stage(address, "", "", "") == stage(store)
    for address in ("https://elsewhere.example/org/adapter", "org/adapter/sub", "/adapter"):
        with pytest.raises(AdapterNotFoundError):
            store.stage(address, "", "", "")


def test_a_chat_template_and_a_tokenizer_are_fetched_with_their_adapter(
    hub: StandInHub, store: AdapterStore, files: dict[str, bytes]
) -> None:
    templates = {"chat_template.jinja": b"mine", "additional_chat_templates/rag.jinja": b"other"}
    hub.push("org/adapter", {**files, **templates, "tokenizer_config.json": b"{}", "tokenizer.json": b"x"})
    assert stage(store).text.chat_templates == {"default": "mine", "rag": "other"}
    texts = ["tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "rag.jinja"]
    assert downloads(hub) == sorted([CONFIG, TENSORS, *texts])


def test_staging_again_only_requests_the_commit(
    hub: StandInHub, store: AdapterStore, new_store: NewStore, files: dict[str, bytes]
) -> None:
    hub.push("org/adapter", files)
    staged = stage(store)
    hub.requests.clear()
    assert stage(store) == staged
    assert stage(new_store()) == staged  # from the files on disk
    assert hub.requests == ["GET /api/models/org/adapter"] * 2


def test_a_moved_branch_gives_a_new_digest_and_a_commit_stays_the_same(
    hub: StandInHub, store: AdapterStore, files: dict[str, bytes], retrained: dict[str, bytes]
) -> None:
    first_commit = hub.push("org/adapter", files)
    first = stage(store)
    second_commit = hub.push("org/adapter", retrained)
    second = stage(store)
    assert (first.revision, second.revision) == (first_commit, second_commit)
    assert first.digest != second.digest
    assert stage(store, revision=first_commit) == first


def test_a_branch_can_be_requested(
    hub: StandInHub, store: AdapterStore, files: dict[str, bytes], retrained: dict[str, bytes]
) -> None:
    hub.push("org/adapter", files)
    commit = hub.push("org/adapter", retrained, branch="feature/v2")
    assert stage(store, revision="feature/v2").revision == commit


def test_the_same_files_have_the_same_digest_from_both_sources(
    hub: StandInHub, new_store: NewStore, files: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "adapters" / "mine").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "adapters" / "mine" / name).write_bytes(data)
    hub.push("org/adapter", files)
    store = new_store(tmp_path / "adapters")
    assert stage(store).digest == store.stage("mine", "local", "", "").digest


def test_an_empty_source_means_local_if_the_directory_has_the_name_and_otherwise_the_hub(
    hub: StandInHub, new_store: NewStore, files: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "adapters" / "org" / "both").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "adapters" / "org" / "both" / name).write_bytes(data)
    hub.push("org/both", files)
    hub.push("org/adapter", files)
    store = new_store(tmp_path / "adapters")
    assert store.stage("org/both", "", "", "").source == "local"
    assert store.stage("org/both", "hub", "", "").source == "hub"
    assert store.stage("org/adapter", "", "", "").source == "hub"


def test_a_private_adapter_needs_its_token_each_time(
    hub: StandInHub, store: AdapterStore, files: dict[str, bytes]
) -> None:
    hub.push("org/adapter", files, tokens=frozenset({TOKEN}))
    hub.push("org/other", files, tokens=frozenset({OTHER_TOKEN}))
    with pytest.raises(AdapterNotFoundError, match="token"):
        stage(store)
    stage(store, token=TOKEN)
    with pytest.raises(AdapterNotFoundError, match="token"):
        stage(store)  # although the files are on disk
    with pytest.raises(AdapterNotFoundError):
        stage(store, token=OTHER_TOKEN)
    with pytest.raises(AdapterForbiddenError, match="token"):
        stage(store, token="hf_madeUp")


def test_a_gated_adapter_is_forbidden(hub: StandInHub, store: AdapterStore, files: dict[str, bytes]) -> None:
    hub.push("org/adapter", files, gated=True)
    with pytest.raises(AdapterForbiddenError):
        stage(store)


def test_no_token_appears_in_an_error_or_a_log(
    hub: StandInHub, store: AdapterStore, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    hub.push("org/adapter", files, tokens=frozenset({TOKEN}))
    for token in ("hf_madeUp", "hf_madeUp\n", "hf_madeUp\r\nX: y", "hf_madeUp€"):
        with pytest.raises(AdapterForbiddenError) as caught:
            stage(store, token=token)
        assert "hf_madeUp" not in repr(caught.value)
    stage(store, token=TOKEN)
    hub.failure = 500
    with pytest.raises(AdapterSourceError) as failed:
        stage(store, token=TOKEN)
    assert TOKEN not in repr(failed.value)
    assert not any(token in caplog.text for token in ("hf_madeUp", TOKEN))


def test_adapters_that_the_hub_does_not_have_are_not_found(
    hub: StandInHub, store: AdapterStore, files: dict[str, bytes]
) -> None:
    with pytest.raises(AdapterNotFoundError, match="org/adapter"):
        stage(store)
    hub.push("org/adapter", files)
    with pytest.raises(AdapterNotFoundError, match="revision 'v9'"):
        stage(store, revision="v9")


@pytest.mark.parametrize("id", ["", "a/b/c", "../etc/passwd", "org/..", "org/a?x=1", "org/a#b", "org/a b", "x" * 200])
def test_the_hub_is_not_asked_for_an_invalid_id(hub: StandInHub, store: AdapterStore, id: str) -> None:
    with pytest.raises(AdapterNotFoundError):
        stage(store, id=id)
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["../main", "a/../b", "main?x", "a b", "-x", "é", "x" * 300, "a\nb"])
def test_the_hub_is_not_asked_for_an_invalid_revision(hub: StandInHub, store: AdapterStore, revision: str) -> None:
    with pytest.raises(AdapterNotFoundError, match="revision"):
        stage(store, revision=revision)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([TENSORS], f"{CONFIG} is missing"),
        ([CONFIG], f"{TENSORS} is missing"),
        ([CONFIG, PICKLE], f"{PICKLE} is a pickle file"),
    ],
)
def test_a_repository_that_is_not_an_adapter_is_refused_before_any_download(
    hub: StandInHub, store: AdapterStore, names: list[str], message: str
) -> None:
    hub.push("org/adapter", dict.fromkeys(names, b"x"))
    with pytest.raises(AdapterInvalidError, match=message):
        stage(store)
    assert downloads(hub) == []


def test_a_file_over_its_limit_is_refused_before_any_download(
    hub: StandInHub, store: AdapterStore, files: dict[str, bytes]
) -> None:
    hub.push("org/adapter", {**files, CONFIG: b" " * (2**20 + 1)})
    with pytest.raises(AdapterInvalidError, match="the limit is 1048576"):
        stage(store)
    assert downloads(hub) == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_fails_is_a_source_error(hub: StandInHub, store: AdapterStore, status: int) -> None:
    hub.failure = status
    with pytest.raises(AdapterSourceError, match=str(status)):
        stage(store)


def test_a_busy_hub_is_asked_again(
    hub: StandInHub, store: AdapterStore, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    hub.push("org/adapter", files)
    hub.busy = 3
    assert stage(store).lora_rank == 4
    assert caplog.text.count("the hub answered 503 for 'org/adapter'; trying again in") == 3


@pytest.mark.parametrize("header", ["0", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_hub_may_say_when_to_try_again(
    hub: StandInHub,
    store: AdapterStore,
    files: dict[str, bytes],
    header: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 3600.0)
    hub.push("org/adapter", files)
    hub.busy, hub.retry_after = 1, header
    assert stage(store).lora_rank == 4


def test_a_hub_that_asks_for_too_much_patience_is_not_waited_for(
    hub: StandInHub, store: AdapterStore, files: dict[str, bytes]
) -> None:
    hub.failure, hub.retry_after = 429, "3600"
    with pytest.raises(AdapterSourceError, match="answered 429 for 'org/adapter' and asks to try again in 3600 s"):
        stage(store)
    assert len(hub.requests) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_will_not_change_is_not_asked_again(hub: StandInHub, store: AdapterStore, status: int) -> None:
    hub.failure = status
    with pytest.raises(AdapterError):
        stage(store)
    assert len(hub.requests) == 1


def test_what_arrives_damaged_is_fetched_again_and_then_refused(
    hub: StandInHub,
    store: AdapterStore,
    files: dict[str, bytes],
    retrained: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub.push("org/adapter", files)
    hub.damaged = 2
    store.load(stage(store).digest, 1)
    assert caplog.text.count("arrived damaged: its sha256 is") == 2
    hub.push("org/adapter", retrained)
    hub.damaged = 100
    with pytest.raises(AdapterSourceError, match=f"{TENSORS} of 'org/adapter' arrived damaged: its sha256 is .*, but"):
        stage(store)
    hub.damaged = 0
    assert stage(store).lora_rank == 4


def test_a_hub_that_does_not_answer_in_time_is_a_source_error(
    hub: StandInHub, new_store: NewStore, files: dict[str, bytes]
) -> None:
    hub.push("org/adapter", files)
    store = new_store(timeout_s=0.05)
    hub.delay_s = 60.0
    with pytest.raises(AdapterSourceError, match="Timeout"):
        stage(store)
    hub.delay_s = 0.0
    stage(new_store())


def test_an_unreachable_hub_is_a_source_error(tmp_path: Path) -> None:
    with StandInHub() as hub:
        source = HubSource(hub.url, tmp_path)
    store = AdapterStore(layouts(), torch.float32, torch.device("cpu"), BASE, [source])
    with pytest.raises(AdapterSourceError):
        stage(store)


def test_adapters_that_were_downloaded_before_are_served_offline(
    hub: StandInHub,
    store: AdapterStore,
    new_store: NewStore,
    files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit = hub.push("org/adapter", {**files, "additional_chat_templates/rag.jinja": b"mine"})
    fetched = stage(store)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    for revision in ("", "main", commit):
        cached = stage(new_store(), revision=revision)
        assert (cached.digest, cached.revision, cached.text) == (fetched.digest, commit, fetched.text)
    for id, revision in (("org/other", ""), ("org/adapter", "v2")):
        with pytest.raises(AdapterNotFoundError, match="is not in the hub cache, and HF_HUB_OFFLINE is set"):
            stage(store, id, revision)
    with pytest.raises(AdapterNotFoundError, match="is not a valid hub repository id"):
        stage(store, "../adapter")
    assert not hub.requests


def test_the_endpoint_comes_from_the_environment(
    hub: StandInHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    commit = hub.push("org/adapter", files)
    assert HubSource().locate("org/adapter", "", "").revision == commit


def test_concurrent_calls_download_an_adapter_once(
    hub: StandInHub, store: AdapterStore, files: dict[str, bytes]
) -> None:
    hub.push("org/adapter", files)
    hub.delay_s = 0.1
    with ThreadPoolExecutor(8) as pool:
        staged = set(pool.map(lambda _: stage(store), range(8)))
    assert len(staged) == 1
    assert downloads(hub) == sorted([CONFIG, TENSORS])


def test_what_is_fetched_in_advance_is_not_fetched_again(
    hub: StandInHub, store: AdapterStore, files: dict[str, bytes]
) -> None:
    hub.push("org/adapter", files)
    assert store.fetch("org/adapter", "hub", "").size == sum(map(len, files.values()))
    assert store.count() == {"host": 0, "device": 0}
    hub.requests.clear()
    stage(store)
    assert downloads(hub) == []
    hub.push("org/cut", {**files, TENSORS: files[TENSORS][:-1]})
    with pytest.raises(AdapterInvalidError, match=TENSORS):
        store.fetch("org/cut", "", "")


def test_a_running_fetch_says_how_far_it_is(hub: StandInHub, store: AdapterStore, files: dict[str, bytes]) -> None:
    hub.push("org/adapter", files)
    hub.delay_s = 60.0
    with ThreadPoolExecutor(2) as pool:
        fetch, both = pool.submit(store.fetch, "org/adapter", "hub", ""), pool.submit(stage, store)
        try:
            while len(hub.requests) < 2:
                time.sleep(0.001)
            (progress,) = store.fetches()
            assert (progress.id, progress.source, progress.done, progress.total) == ("org/adapter", "hub", 0, 0)
        finally:
            hub.release()
        fetch.result()
        both.result()
    assert store.fetches() == []
    assert downloads(hub) == sorted([CONFIG, TENSORS])


def test_progress_is_counted_in_bytes_and_has_the_trouble_of_the_last_try(
    hub: StandInHub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("org/adapter", files)
    origin, progress = HubSource(hub.url, tmp_path / "cache").locate("org/adapter", "", ""), Progress("org/adapter")
    seen: list[tuple[int, str]] = []
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: seen.append((progress.done, progress.trouble)))
    hub.damaged = 1
    origin.fetch(progress)
    ((done, trouble),) = seen
    assert done == len(files[CONFIG])
    assert "arrived damaged" in trouble
    assert (progress.done, progress.total, progress.trouble) == (origin.size, origin.size, "")


def test_a_slow_hub_does_not_delay_other_calls(
    hub: StandInHub, new_store: NewStore, files: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "adapters" / "mine").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "adapters" / "mine" / name).write_bytes(data)
    hub.push("org/adapter", files)
    store = new_store(tmp_path / "adapters")
    local = store.stage("mine", "local", "", "")
    store.load(local.digest, 1)
    hub.delay_s = 60.0
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(stage, store)
        while not hub.requests:
            time.sleep(0.001)
        assert store.stage("mine", "", "", "") == local
        store.load(local.digest, 2)
        store.unload(1)
        assert store.adapter_in(2)
        assert not slow.done()
        hub.release()
        assert slow.result().source == "hub"


def test_the_disks_error_is_part_of_the_message(
    hub: StandInHub, store: AdapterStore, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.push("org/adapter", files)
    (tmp_path / "cache").touch()  # a file instead of a folder
    with pytest.raises(AdapterSourceError, match=r"did not return 'org/adapter': (Not a directory|File exists)"):
        stage(store)
