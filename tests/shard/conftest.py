"""A tiny Llama; the files of an adapter, and of a retrained version, for use in any source; and sources' patience, cut
short."""

from pathlib import Path

import pytest

from loraplex_shard.lora.sources import patience
from tests.shard.lora_models import contents, save_adapter
from tests.shard.planner import save_llama


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Busy sources are tried again at once."""
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.001)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    save_llama(directory)
    return directory


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(directory)
    return contents(directory)


@pytest.fixture(scope="module")
def retrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("retrained")
    save_adapter(directory, seed=1)
    return contents(directory)
