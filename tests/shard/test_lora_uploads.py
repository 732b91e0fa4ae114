"""Adapters whose files are sent: the same content as from a folder, or refused by name."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.sources.files import CONFIG, PICKLE, TENSORS
from loraplex_shard.lora.store import AdapterStore
from tests.shard.test_lora_store import contents, save_adapter, stage, store_of


def sent(files: dict[str, bytes], size: int = 1000) -> Iterator[bytes]:
    whole = b"".join(files.values())
    return (whole[start : start + size] for start in range(0, len(whole), size))


def sizes(files: dict[str, bytes]) -> dict[str, int]:
    return {name: len(data) for name, data in files.items()}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter-1", seed=1, r=2)
    return tmp_path


@pytest.fixture
def store(directory: Path) -> AdapterStore:
    return store_of(directory)


@pytest.fixture
def files(directory: Path) -> dict[str, bytes]:
    return {name: bytes(data) for name, data in contents(directory / "adapter-1").items()}


@pytest.mark.parametrize("size", [1, 1000, 10**9])
def test_what_is_sent_is_what_a_folder_would_have(store: AdapterStore, files: dict[str, bytes], size: int) -> None:
    uploaded = store.stage_upload(sizes(files), sent(files, size))
    staged = stage(store, "adapter-1")
    assert (uploaded.digest, uploaded.lora_rank, uploaded.source) == (staged.digest, staged.lora_rank, "upload")
    assert store.count()["host"] == 1
    store.load(uploaded.digest, 1)
    store.unload(1)
    store.unstage(uploaded.digest)
    assert store.count_bytes() == {"host": 0, "device": 0}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda files: files.pop(CONFIG), f"{CONFIG} is missing"),
        (lambda files: files.pop(TENSORS), f"{TENSORS} is missing"),
        (lambda files: files.update({"README.md": b"Hi"}), "'README.md' is not a file that an adapter is read from"),
        (lambda files: files.update({"../x": b""}), "is not a file that an adapter is read from"),
        (lambda files: files.update({PICKLE: files.pop(TENSORS)}), "is a pickle file"),
        (lambda files: files.update({TENSORS: b""}), TENSORS),
        (lambda files: files.update({CONFIG: b"{"}), CONFIG),
    ],
)
def test_what_is_not_an_adapter_is_refused(
    store: AdapterStore, files: dict[str, bytes], change: object, fault: str
) -> None:
    change(files)  # type: ignore[operator]
    with pytest.raises(AdapterInvalidError, match=fault):
        store.stage_upload(sizes(files), sent(files))
    assert store.count()["host"] == 0


def test_a_file_that_is_too_large_is_refused_before_it_is_sent(store: AdapterStore) -> None:
    def never() -> Iterator[bytes]:
        raise AssertionError
        yield

    with pytest.raises(AdapterInvalidError, match="the limit is"):
        store.stage_upload({CONFIG: 2**40, TENSORS: 8}, never())


def test_too_much_and_too_little_are_refused(store: AdapterStore, files: dict[str, bytes]) -> None:
    with pytest.raises(AdapterInvalidError, match="cut short: 1 bytes"):
        store.stage_upload({**sizes(files), TENSORS: len(files[TENSORS]) + 1}, sent(files))
    with pytest.raises(AdapterInvalidError, match="more bytes than"):
        store.stage_upload({**sizes(files), TENSORS: len(files[TENSORS]) - 1}, sent(files))
