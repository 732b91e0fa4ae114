"""The store: staging by digest, slots, and local ids, also from many threads."""

import contextlib
import json
import os
import shutil
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from unittest.mock import MagicMock

import psutil
import pytest
import torch

from loraplex_protos.errors import (
    AdapterError,
    AdapterInUseError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterSourceError,
    OverloadedError,
    UnavailableError,
)
from loraplex_shard.lora.merge import Recipe
from loraplex_shard.lora.reader import AdapterReader
from loraplex_shard.lora.sources.files import CONFIG, TENSORS
from loraplex_shard.lora.sources.hub import HubSource
from loraplex_shard.lora.sources.local import LocalSource
from loraplex_shard.lora.sources.patience import Progress
from loraplex_shard.lora.sources.protocol import File, Origin
from loraplex_shard.lora.sources.text_files import AdapterText
from loraplex_shard.lora.store import AdapterStore, StagedAdapter
from loraplex_shard.lora.weights.transfer import Transfer
from tests.shard.lora_models import BASE, contents, edit_config, layouts, peft_deltas, save_adapter, whole_deltas


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    for index in range(3):
        save_adapter(directory / f"adapter-{index}", seed=index, r=index + 1)
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """An adapter directory that the test may change."""
    return shutil.copytree(saved, tmp_path / "adapters")


@pytest.fixture
def store(directory: Path) -> AdapterStore:
    return store_of(directory)


def store_of(directory: Path | None, hub: HubSource | None = None, host_bytes: int = 1 << 40) -> AdapterStore:
    device = torch.device("cpu")
    sources = [*([LocalSource(directory)] if directory else []), hub or HubSource()]
    return AdapterStore(layouts(), torch.float32, device, BASE, sources, host_bytes=host_bytes)


def make_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


class CountingHub(HubSource):
    """Serves the adapters of a directory, and records reads."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.before_read: Callable[[], object] = lambda: None
        self._directory = directory
        self._calls = 0
        self._called = threading.Condition()

    def locate(self, id: str, revision: str, token: str) -> Origin:
        with self._called:
            self._calls += 1
            self._called.notify_all()
        return Origin(self, id, tuple((name, File(id, "commit", 0)) for name in (CONFIG, TENSORS)), "commit")

    def wait_for_calls(self, count: int) -> None:
        with self._called:
            assert self._called.wait_for(lambda: self._calls == count, timeout=60)

    def fetch(self, origin: Origin, progress: Progress) -> dict[str, Path]:
        return {name: self._directory / origin.id / name for name, _ in origin.files}

    def read(self, origin: Origin) -> dict[str, memoryview]:
        self.reads.append(origin.id)
        self.before_read()
        return {name: memoryview(bytearray(data)) for name, data in contents(self._directory / origin.id).items()}


def stage(store: AdapterStore, id: str) -> StagedAdapter:
    return store.stage(id, "local", "", "")


def at_once(calls: int, call: Callable[[int], object]) -> list[object]:
    """Runs the calls at the same moment, each in its own thread, and returns their results."""
    barrier = threading.Barrier(calls)

    def run(index: int) -> object:
        barrier.wait()
        return call(index)

    with ThreadPoolExecutor(calls) as pool:
        return list(pool.map(run, range(calls)))


def test_a_staged_adapter_is_described(store: AdapterStore) -> None:
    staged = stage(store, "adapter-2")
    assert (staged.source, staged.revision, staged.lora_rank) == ("local", "", 3)
    assert len(staged.digest) == 64
    store.load(staged.digest, 1)
    assert staged.size_bytes == store.adapter_in(1).size_bytes


def test_a_slot_holds_the_adapter_that_was_loaded_into_it(saved: Path, store: AdapterStore, tmp_path: Path) -> None:
    digests = [stage(store, f"adapter-{index}").digest for index in range(3)]
    for slot, digest in enumerate(digests, start=1):
        store.load(digest, slot)
    for index in range(3):
        expected = peft_deltas(save_adapter(tmp_path / "again", seed=index, r=index + 1))
        actual = whole_deltas([store.adapter_in(index + 1)])
        assert actual.keys() == expected.keys()
        for module, delta in expected.items():
            torch.testing.assert_close(actual[module], delta)


def test_on_the_cpu_slots_share_the_staged_tensors(store: AdapterStore) -> None:
    digest = stage(store, "adapter-0").digest
    store.load(digest, 1)
    store.load(digest, 2)
    assert store.adapter_in(1) is store.adapter_in(2)


def test_staging_is_limited_by_the_memory(directory: Path) -> None:
    small, large = (store_of(directory).stage(f"adapter-{n}", "", "", "").size_bytes for n in (0, 2))
    store = store_of(directory, host_bytes=large + small - 1)
    first = store.stage("adapter-0", "", "", "")
    with pytest.raises(OverloadedError, match=f"needs {large:,} bytes of host memory, but only {large - 1:,} are free"):
        store.stage("adapter-2", "", "", "")
    store.unstage(first.digest)
    assert store.stage("adapter-2", "", "", "").size_bytes == large
    with pytest.raises(AdapterInvalidError, match="give the shards more memory"):
        store_of(directory, host_bytes=large - 1).stage("adapter-2", "", "", "")


@pytest.fixture
def on_gpu(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AdapterStore:
    """A store whose device would be a GPU."""
    for name in "Stream", "default_stream", "stream":
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    return AdapterStore(layouts(), torch.float32, torch.device("cuda"), BASE, [LocalSource(directory)])


def test_an_adapter_that_the_device_has_no_memory_for_can_be_loaded_later(
    on_gpu: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = stage(on_gpu, "adapter-0").digest
    monkeypatch.setattr(torch.Tensor, "to", MagicMock(side_effect=torch.OutOfMemoryError))
    with pytest.raises(OverloadedError, match="the device has no memory for the adapter's"):
        on_gpu.load(digest, 1)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor.clone())
    on_gpu.load(digest, 1)
    assert on_gpu.adapter_in(1)


def test_a_gpus_memory_is_handed_out_in_pieces(on_gpu: AdapterStore) -> None:
    assert stage(on_gpu, "adapter-0").device_bytes == 2 << 20


def test_an_adapter_that_can_never_fit_onto_the_device_is_refused_with_both_numbers(directory: Path) -> None:
    needed = stage(store_of(directory), "adapter-0").device_bytes
    cpu = torch.device("cpu")
    store = AdapterStore(layouts(), torch.float32, cpu, BASE, [LocalSource(directory)], device_bytes=needed - 1)
    with pytest.raises(AdapterInvalidError, match=f"{needed:,} bytes of the device's memory.*may take {needed - 1:,}"):
        stage(store, "adapter-0")
    assert store.count() == {"host": 0, "device": 0}


def test_a_reload_does_not_read_files(store: AdapterStore, directory: Path) -> None:
    digest = stage(store, "adapter-0").digest
    store.load(digest, 1)
    before = store.adapter_in(1)
    store.unload(1)
    shutil.rmtree(directory)
    store.load(digest, 1)
    assert store.adapter_in(1) is before


def test_a_local_adapter_is_identified_by_the_status_of_its_files(directory: Path) -> None:
    source = LocalSource(directory)
    for name in (CONFIG, TENSORS):
        before = source.locate("adapter-0", "", "")
        assert source.locate("adapter-0", "", "") == before
        (directory / "adapter-0" / name).touch()
        assert source.locate("adapter-0", "", "") != before


def test_files_that_change_while_they_are_read_are_not_staged(directory: Path) -> None:
    origin = LocalSource(directory).locate("adapter-0", "", "")
    (directory / "adapter-0" / TENSORS).touch()
    with pytest.raises(AdapterSourceError, match="changed while they were read"):
        origin.read()


def test_a_staged_adapter_is_not_read_again(saved: Path) -> None:
    hub = CountingHub(saved)
    store = store_of(None, hub)
    staged = store.stage("adapter-0", "hub", "", "")
    assert store.stage("adapter-0", "hub", "", "") == staged
    assert hub.reads == ["adapter-0"]
    store.unstage(staged.digest)
    assert store.stage("adapter-0", "hub", "", "") == staged
    assert hub.reads == ["adapter-0"] * 2


def test_changed_content_gets_a_new_digest_and_the_old_one_stays(store: AdapterStore, directory: Path) -> None:
    old = stage(store, "adapter-0")
    edit_config(directory / "adapter-0", lora_alpha=99)
    new = stage(store, "adapter-0")
    assert new.digest != old.digest
    store.load(old.digest, 1)
    store.load(new.digest, 2)
    assert not whole_deltas([store.adapter_in(1)]).keys() ^ whole_deltas([store.adapter_in(2)]).keys()
    old_b = store.adapter_in(1).layers["layers.0.o"].expansions[0].weight
    new_b = store.adapter_in(2).layers["layers.0.o"].expansions[0].weight
    torch.testing.assert_close(new_b, old_b * 99 / 8)


def test_the_same_content_under_two_names_is_held_once(store: AdapterStore, directory: Path) -> None:
    shutil.copytree(directory / "adapter-0", directory / "org" / "copy")
    first, second = stage(store, "adapter-0"), stage(store, "org/copy")
    assert first.digest == second.digest
    store.unstage(first.digest)
    with pytest.raises(AdapterNotFoundError):
        store.load(second.digest, 1)


def test_an_adapters_text_files_are_reported_and_part_of_its_content(store: AdapterStore, directory: Path) -> None:
    plain = stage(store, "adapter-0")
    config = directory / "adapter-0" / "tokenizer_config.json"
    config.write_text('{"chat_template": "one", "eos_token": "<|end|>"}')
    staged = stage(store, "adapter-0")
    assert staged.text == AdapterText({"default": "one"}, {"eos_token": "<|end|>"})
    assert plain.text == AdapterText() and staged.digest != plain.digest
    config.write_text('{"chat_template": "one", "eos_token": "<|end|>", "model_max_length": 5}')
    assert stage(store, "adapter-0").digest == staged.digest
    assert "no '<|end|>', which is its eos_token" in staged.warnings[-1]


def test_unreadable_text_files_only_prevent_conversations(store: AdapterStore, directory: Path) -> None:
    (directory / "adapter-0" / "tokenizer_config.json").write_text("{")
    staged = stage(store, "adapter-0")
    assert staged.text.error.startswith("tokenizer_config.json: ")
    assert staged.warnings[-1].startswith("conversations with it are refused: tokenizer_config.json: ")
    store.load(staged.digest, 1)


def test_a_template_that_is_too_large_is_refused(store: AdapterStore, directory: Path) -> None:
    (directory / "adapter-0" / "chat_template.jinja").write_bytes(b"x" * (2**18 + 1))
    with pytest.raises(AdapterInvalidError, match=r"chat_template\.jinja"):
        stage(store, "adapter-0")


def test_the_digest_does_not_depend_on_the_rank(store: AdapterStore, directory: Path) -> None:
    other = AdapterStore(layouts(1, 2), torch.float16, torch.device("cpu"), BASE, [LocalSource(directory)])
    mine, theirs = stage(store, "adapter-0"), stage(other, "adapter-0")
    assert mine.digest == theirs.digest
    assert theirs.size_bytes < mine.size_bytes


def test_an_unstaged_adapter_is_gone_until_it_is_staged_again(store: AdapterStore) -> None:
    digest = stage(store, "adapter-0").digest
    store.unstage(digest)
    store.unstage(digest)
    with pytest.raises(AdapterNotFoundError, match=digest):
        store.load(digest, 1)
    assert stage(store, "adapter-0").digest == digest
    store.load(digest, 1)


def test_an_adapter_in_a_slot_cannot_be_unstaged(store: AdapterStore) -> None:
    digest = stage(store, "adapter-0").digest
    store.load(digest, 1)
    with pytest.raises(AdapterInUseError):
        store.unstage(digest)
    store.unload(1)
    store.unload(1)
    store.unstage(digest)


def test_a_slot_in_use_is_not_overwritten(store: AdapterStore) -> None:
    first, second = stage(store, "adapter-0").digest, stage(store, "adapter-1").digest
    store.load(first, 1)
    store.load(first, 1)
    with pytest.raises(AdapterInUseError, match="slot 1"):
        store.load(second, 1)


def test_an_empty_slot_has_no_adapter(store: AdapterStore) -> None:
    with pytest.raises(KeyError):
        store.adapter_in(1)


def test_a_refused_adapter_can_be_repaired(store: AdapterStore, directory: Path) -> None:
    edit_config(directory / "adapter-0", use_dora=True)
    for _ in range(2):
        with pytest.raises(AdapterInvalidError, match="lora_magnitude_vector"):
            stage(store, "adapter-0")
    edit_config(directory / "adapter-0", use_dora=False)
    stage(store, "adapter-0")


def test_concurrent_calls_for_the_same_adapter_do_the_work_once(saved: Path) -> None:
    hub = CountingHub(saved)
    store = store_of(None, hub)
    hub.before_read = lambda: hub.wait_for_calls(16)
    results = at_once(16, lambda _: store.stage("adapter-0", "hub", "", ""))
    assert len(set(results)) == 1
    assert hub.reads == ["adapter-0"]


def test_different_adapters_are_staged_at_the_same_time(saved: Path) -> None:
    hub = CountingHub(saved)
    store = store_of(None, hub)
    meeting = threading.Barrier(3)
    hub.before_read = lambda: meeting.wait(timeout=60)  # passes only while all three are being read
    results = at_once(3, lambda index: store.stage(f"adapter-{index}", "hub", "", ""))
    assert len(set(results)) == 3


def test_a_failure_reaches_all_concurrent_callers(store: AdapterStore, directory: Path) -> None:
    (directory / "adapter-0" / TENSORS).write_bytes(b"")

    def attempt(_: int) -> type[AdapterError] | None:
        try:
            stage(store, "adapter-0")
        except AdapterError as error:
            return type(error)
        return None

    assert set(at_once(8, attempt)) == {AdapterInvalidError}


def test_staging_loading_and_reading_from_many_threads_keeps_each_slot_whole(store: AdapterStore) -> None:
    expected = {}
    for index in range(3):
        digest = stage(store, f"adapter-{index}").digest
        store.load(digest, 1)
        expected[digest] = whole_deltas([store.adapter_in(1)])
        store.unload(1)

    def work(thread: int) -> None:
        for turn in range(20):
            digest = stage(store, f"adapter-{(thread + turn) % 3}").digest
            try:
                store.load(digest, thread + 1)
            except AdapterNotFoundError:
                continue  # another thread has just unstaged it
            actual = whole_deltas([store.adapter_in(thread + 1)])
            assert all(actual[module].equal(delta) for module, delta in expected[digest].items())
            store.unload(thread + 1)
            with contextlib.suppress(AdapterInUseError):  # it is in another thread's slot
                store.unstage(digest)

    at_once(6, work)


class Paused:
    """Calls of a method that wait in the middle of their work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.came, self.may_go_on = threading.Event(), threading.Event()
        method = getattr(owner, name)

        def paused(*args: object) -> object:
            self.came.set()
            assert self.may_go_on.wait(60)
            return method(*args)

        monkeypatch.setattr(owner, name, paused)


WAYS: dict[str, Callable[[AdapterStore, Path, str], object]] = {
    "stage": lambda store, directory, digest: stage(store, "adapter-1"),
    "upload": lambda store, directory, digest: store.stage_upload(
        {name: len(data) for name, data in contents(directory / "adapter-1").items()},
        iter(contents(directory / "adapter-1").values()),
    ),
    "merge": lambda store, directory, digest: store.merge("merged", [digest], Recipe((1.0,), "linear", 1.0, "total")),
    "load": lambda store, directory, digest: store.load(digest, 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_lost_router_began_does_not_come_to_the_next_one(
    store: AdapterStore, directory: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = stage(store, "adapter-0").digest
    owner, name = {"load": (Transfer, "to_device"), "merge": (AdapterReader, "merge")}.get(way, (AdapterReader, "read"))
    paused = Paused(monkeypatch, owner, name)
    with ThreadPoolExecutor(2) as threads:
        late = threads.submit(WAYS[way], store, directory, digest)
        assert paused.came.wait(60)
        store.clear()
        again = threads.submit(stage, store, "adapter-1")  # is not joined to what the other one waits for
        paused.may_go_on.set()
        with pytest.raises(UnavailableError, match="another router"):
            late.result(60)
        digest = again.result(60).digest
    assert store.count() == {"host": 1, "device": 0}
    store.load(digest, 1)
    store.unload(1)
    store.unstage(digest)
    assert store.count_bytes() == {"host": 0, "device": 0}


class HangingSource(LocalSource):
    """Hangs as long as there is a file."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.hangs = directory / ".hangs"

    def fetch(self, origin: Origin, progress: Progress) -> dict[str, Path]:
        while self.hangs.exists():
            (self.hangs.parent / f".{os.getpid()}").touch()
            time.sleep(0.01)
        return super().fetch(origin, progress)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_processes_of_a_lost_router_end_whatever_they_are_doing(directory: Path) -> None:
    source = HangingSource(directory)
    store = AdapterStore(layouts(), torch.float32, torch.device("cpu"), BASE, [source])
    before = set(psutil.Process().children(recursive=True))

    def processes() -> int:
        return len(set(psutil.Process().children(recursive=True)) - before)

    with closing(store.read_apart()), ThreadPoolExecutor(8) as threads:
        source.hangs.touch()
        calls: list[Future[object]] = [threads.submit(stage, store, f"adapter-{number % 3}") for number in range(6)]
        calls += [threads.submit(store.fetch, f"adapter-{number}", "local", "") for number in range(2)]
        wait_until(lambda: processes() == 9 and len(list(directory.glob(".[0-9]*"))) == 3)
        store.clear()
        for call in calls:
            with pytest.raises(UnavailableError):
                call.result(60)
        wait_until(lambda: processes() == 1)
        source.hangs.unlink()
        assert stage(store, "adapter-0").digest
        assert store.count() == {"host": 1, "device": 0}


def test_a_call_ends_when_its_client_leaves_and_others_for_the_same_files_go_on(directory: Path) -> None:
    source = HangingSource(directory)
    store = AdapterStore(layouts(), torch.float32, torch.device("cpu"), BASE, [source])
    leave = deque[Callable[[], None]]()

    def on_leave(end: Callable[[], None]) -> bool:
        leave.append(end)
        return True

    with closing(store.read_apart()), ThreadPoolExecutor(2) as threads:
        source.hangs.touch()
        first = threads.submit(store.stage, "adapter-0", "local", "", "", on_leave)
        wait_until(lambda: list(directory.glob(".[0-9]*")))
        second = threads.submit(stage, store, "adapter-0")
        leave.pop()()
        with pytest.raises(UnavailableError, match="has left"):
            first.result(60)
        source.hangs.unlink()
        assert second.result(60).lora_rank == 1
        with pytest.raises(UnavailableError, match="has left"):
            store.stage("adapter-1", "local", "", "", lambda end: False)  # its client has left already


@pytest.mark.parametrize("source", ["", "local", "gcs"])
def test_an_adapter_in_no_source_is_refused_with_a_list_of_the_sources(source: str) -> None:
    with pytest.raises(AdapterNotFoundError, match=r"sources are hub .*--adapters"):
        store_of(None).stage("adapter-0", source, "", "")


@pytest.mark.parametrize(
    "id",
    [
        "",
        ".",
        "..",
        "/",
        "../outside",
        "adapter-0/..",
        "adapter-0/../../outside",
        "/etc",
        "adapter-0/",
        "//adapter-0",
        "./adapter-0",
        ".hidden",
        "org/.hidden",
        "adapter-0\0",
        "adapter-0\n",
        "adapter 0",
        "ädapter",
        "~root",
        "a/b/c/d/e",
        "a" * 5000,
        "link-out",
        "link-out/deeper",
        "missing",
        "loop",
    ],
)
def test_an_id_cannot_point_outside_the_directory(
    store: AdapterStore, directory: Path, tmp_path: Path, id: str
) -> None:
    shutil.copytree(directory / "adapter-0", tmp_path / "outside" / "deeper")
    shutil.copytree(directory / "adapter-0", directory / ".hidden")
    (directory / "org").mkdir()
    (directory / "org" / ".hidden").symlink_to(directory / "adapter-0")
    (directory / "link-out").symlink_to(tmp_path / "outside")
    (directory / "loop").symlink_to(directory / "loop")
    with pytest.raises(AdapterNotFoundError):
        stage(store, id)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_link_out_of_the_directory_is_not_read(
    store: AdapterStore, directory: Path, tmp_path: Path, name: str
) -> None:
    file = directory / "adapter-0" / name
    file.rename(tmp_path / name)
    file.symlink_to(tmp_path / name)
    with pytest.raises(AdapterInvalidError, match=f"{name} is missing"):
        stage(store, "adapter-0")


def test_links_within_the_directory_are_followed(store: AdapterStore, directory: Path) -> None:
    (directory / "latest").symlink_to(directory / "adapter-1")
    assert stage(store, "latest") == stage(store, "adapter-1")


def test_a_path_under_the_directory_is_a_name(store: AdapterStore, directory: Path) -> None:
    assert stage(store, f"{directory}/adapter-1/") == stage(store, "adapter-1")
    for path in (f"{directory}/../adapters/adapter-1", f"{directory}//adapter-1", "/etc", str(directory)):
        with pytest.raises(AdapterNotFoundError):
            stage(store, path)


@pytest.mark.parametrize("name", [CONFIG, TENSORS, "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("make", "said"),
    [(os.mkfifo, "not a regular file"), (os.mkdir, "a folder"), (make_socket, "not a regular file")],
)
def test_what_is_not_a_file_is_refused_by_name_and_at_once(
    store: AdapterStore, directory: Path, name: str, make: Callable[[Path], object], said: str
) -> None:
    path = directory / "adapter-0" / name
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(AdapterInvalidError, match=f"{name} is {said}"):
        stage(store, "adapter-0")


def test_no_byte_of_weights_is_read_if_their_header_shows_a_fault(
    store: AdapterStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Origin, "read", lambda origin: pytest.fail("it was read"))
    zeros, wrong = directory / "adapter-0" / TENSORS, directory / "adapter-1" / TENSORS
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": [2**14, 2**14], "data_offsets": [0, 2**30]}}).encode()
    zeros.write_bytes(b"")
    os.truncate(zeros, 2**30)
    wrong.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(wrong, 2**30 + 8 + len(header))
    for id, reason in ("adapter-0", "header is malformed"), ("adapter-1", "lora_A"):
        with pytest.raises(AdapterInvalidError, match=reason):
            stage(store, id)


def test_a_local_adapter_has_no_revisions(store: AdapterStore) -> None:
    with pytest.raises(AdapterNotFoundError, match="no revisions"):
        store.stage("adapter-0", "local", "main", "")
