"""Adapters from S3: what is asked of it, what belongs together, and what goes wrong."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loraplex_protos.errors import (
    AdapterForbiddenError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterSourceError,
)
from loraplex_shard.lora.sources import files as limits
from loraplex_shard.lora.sources.files import CONFIG, PICKLE, TENSORS
from loraplex_shard.lora.sources.hub import HubSource
from loraplex_shard.lora.sources.s3 import S3Source
from loraplex_shard.lora.store import AdapterStore
from loraplex_shard.settings import ShardSettings
from tests.shard.lora_models import BASE, layouts, save_adapter
from tests.stand_in_hub import StandInHub
from tests.stand_in_s3 import KEY, SECRET, StandInS3


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInS3]:
    with StandInS3(monkeypatch) as s3:
        yield s3


def new_store(directory: Path | None = None, hub: HubSource | None = None) -> AdapterStore:
    source = S3Source("s3://bucket/team/a/", timeout_s=5)
    return AdapterStore(layouts(), torch.float32, torch.device("cpu"), directory, BASE, hub, s3=source)


def test_an_adapter_is_read_once_and_again_when_its_files_change(
    s3: StandInS3, files: dict[str, bytes], retrained: dict[str, bytes]
):
    s3.push("bucket/team/a/nlp/sql", files)
    store = new_store()
    first = store.stage("nlp/sql", "s3", "", "")
    assert (first.source, first.revision) == ("s3", "")
    assert store.stage("nlp/sql", "", "", "") == first
    assert [request for request in s3.requests if request.startswith("GET")] == [
        f"GET bucket/team/a/nlp/sql/{name}" for name in (CONFIG, TENSORS)
    ]
    s3.push("bucket/team/a/nlp/sql", retrained)
    assert store.stage("nlp/sql", "s3", "", "").digest != first.digest


def test_it_is_the_same_adapter_as_in_a_directory(s3: StandInS3, files: dict[str, bytes], tmp_path: Path):
    save_adapter(tmp_path / "sql")
    s3.push("bucket/team/a/sql", files)
    store = new_store(tmp_path)
    local, remote = (store.stage("sql", source, "", "") for source in ("local", "s3"))
    assert local.digest == remote.digest
    assert store.stage("sql", "", "", "").source == "local"


def test_its_chat_templates_come_along(s3: StandInS3, files: dict[str, bytes], tmp_path: Path):
    text = {
        "chat_template.jinja": b"one",
        "tokenizer_config.json": b'{"eos_token": "<|end|>"}',
        "additional_chat_templates/tool_use.jinja": b"two",
    }
    save_adapter(tmp_path / "sql")
    (tmp_path / "sql" / "additional_chat_templates").mkdir()
    for name, data in text.items():
        (tmp_path / "sql" / name).write_bytes(data)
    s3.push("bucket/team/a/sql", {**files, **text})
    local, remote = (new_store(tmp_path).stage("sql", source, "", "") for source in ("local", "s3"))
    assert remote.text.chat_templates == {"default": "one", "tool_use": "two"}
    assert remote.text.special_tokens == {"eos_token": "<|end|>"}
    assert (local.digest, local.text) == (remote.digest, remote.text)


def test_a_bucket_that_may_be_read_but_not_listed_is_enough(s3: StandInS3, files: dict[str, bytes]):
    s3.push("bucket/team/a/sql", {**files, "chat_template.jinja": b"one"})
    s3.listed = False
    assert new_store().stage("sql", "s3", "", "").text.chat_templates == {"default": "one"}
    with pytest.raises(AdapterNotFoundError):
        new_store().stage("other", "s3", "", "")


def test_what_s3_does_not_have_is_looked_for_on_the_hub(s3: StandInS3, files: dict[str, bytes], tmp_path: Path):
    with StandInHub() as hub:
        hub.push("org/adapter", files)
        store = new_store(hub=HubSource(hub.url, tmp_path))
        assert store.stage("org/adapter", "", "", "").source == "hub"
        with pytest.raises(AdapterNotFoundError, match="S3 has no adapter 'sql'"):
            store.stage("sql", "", "", "")


@pytest.mark.parametrize("id", ["", "/", "../other", "a/../b", "a//b", ".hidden", "a/b/c/d/e", "sql?versionId=1"])
def test_an_id_leads_nowhere_but_under_the_prefix(s3: StandInS3, id: str):
    with pytest.raises(AdapterNotFoundError):
        new_store().stage(id, "s3", "", "")
    assert s3.requests == []


def test_what_cannot_be_had_has_a_typed_reason(s3: StandInS3, files: dict[str, bytes]):
    store = new_store()
    s3.push("bucket/team/a/sql", files)
    with pytest.raises(AdapterNotFoundError, match="no revisions"):
        store.stage("sql", "s3", "v1", "")
    s3.push("bucket/team/a/secret", files)
    s3.hidden = {"bucket/team/a/secret/" + CONFIG}
    with pytest.raises(AdapterForbiddenError, match="secret"):
        store.stage("secret", "s3", "", "")
    s3.push("bucket/team/a/pickled", {CONFIG: files[CONFIG], PICKLE: b"cos"})
    with pytest.raises(AdapterInvalidError, match="pickle"):
        store.stage("pickled", "s3", "", "")
    s3.push("bucket/team/a/half", {CONFIG: files[CONFIG]})
    with pytest.raises(AdapterInvalidError, match=TENSORS):
        store.stage("half", "s3", "", "")
    s3.failure = 400
    with pytest.raises(AdapterSourceError, match="400"):
        store.stage("sql", "s3", "", "")


def test_files_that_change_between_look_and_read_are_not_mixed(
    s3: StandInS3, files: dict[str, bytes], retrained: dict[str, bytes]
):
    s3.push("bucket/team/a/sql", files)
    origin = S3Source("s3://bucket/team/a").locate("sql", "")
    s3.push("bucket/team/a/sql", {TENSORS: retrained[TENSORS]})
    with pytest.raises(AdapterSourceError, match="try again"):
        origin.read()


def test_a_file_that_is_too_large_is_not_fetched(
    s3: StandInS3, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(limits.SIZE_LIMITS, TENSORS, 10)
    s3.push("bucket/team/a/sql", files)
    with pytest.raises(AdapterInvalidError, match="the limit is 10"):
        new_store().stage("sql", "s3", "", "")
    assert not any(request.startswith("GET") for request in s3.requests)


def test_no_message_shows_credentials(s3: StandInS3, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(AdapterSourceError) as failure:
        new_store().stage("sql", "s3", "", "")
    cause = failure.value.__cause__
    assert KEY not in f"{failure.value} {cause!r}" and SECRET not in f"{failure.value} {cause!r}"


def test_a_server_without_s3_says_so():
    store = AdapterStore(layouts(), torch.float32, torch.device("cpu"), None, BASE)
    with pytest.raises(AdapterNotFoundError, match="--adapters-s3"):
        store.stage("sql", "s3", "", "")


@pytest.mark.parametrize("url", ["bucket", "s3://", "s3://UPPER/x", "https://bucket/x", "s3://bucket/a b"])
def test_a_setting_that_is_no_address_is_refused(url: str):
    with pytest.raises(ValueError, match="adapters_s3"):
        ShardSettings(adapters_s3=url)
