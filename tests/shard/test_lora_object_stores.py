"""Adapters from S3, Google Cloud Storage and Azure: requests, consistency and errors."""

import hashlib
import random
import socket
import ssl
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trustme
from huggingface_hub import constants

from loraplex_protos.errors import (
    AdapterError,
    AdapterForbiddenError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterSourceError,
)
from loraplex_shard.lora.sources import file_cache, object_store
from loraplex_shard.lora.sources import files as limits
from loraplex_shard.lora.sources.files import CONFIG, PICKLE, TENSORS
from loraplex_shard.lora.sources.hub import HubSource
from loraplex_shard.lora.sources.local import LocalSource
from loraplex_shard.lora.sources.object_store import ObjectStoreSource
from loraplex_shard.lora.sources.order import refusal
from loraplex_shard.lora.sources.parts import has_tag, is_of_parts
from loraplex_shard.lora.sources.protocol import Source
from loraplex_shard.lora.store import AdapterStore, StagedAdapter
from loraplex_shard.serving.server import open_sources
from loraplex_shard.settings import ModelSettings, SettingsError
from tests.shard.lora_models import BASE, layouts, save_adapter
from tests.stand_in_hub import StandInHub
from tests.stand_in_stores import SECRET, StandInAzure, StandInComposedGCS, StandInGCS, StandInS3, StandInStore

NAMES = {"s3": "s3", "gs": "gcs", "az": "azure"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where downloads are kept."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "object-stores"


@pytest.fixture(params=[StandInS3, StandInGCS, StandInAzure])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInStore]:
    with request.param(monkeypatch) as store:
        yield store


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInS3]:
    with StandInS3(monkeypatch) as s3:
        yield s3


def source_of(store: StandInStore, timeout_s: float = 5) -> ObjectStoreSource:
    return ObjectStoreSource(f"{store.scheme}://bucket/team/a/", timeout_s)


def stage(store: StandInStore, id: str, source: str = "", others: tuple[Source, ...] = ()) -> StagedAdapter:
    """Stages an adapter in a new store."""
    adapters = AdapterStore(layouts(), torch.float32, torch.device("cpu"), BASE, [*others, source_of(store)])
    return adapters.stage(id, source, "", "")


def test_an_adapter_is_read_once_and_again_when_its_files_change(
    store: StandInStore, files: dict[str, bytes], retrained: dict[str, bytes]
):
    store.push("bucket/team/a/nlp/sql", files)
    adapters = AdapterStore(layouts(), torch.float32, torch.device("cpu"), BASE, [source_of(store)])
    first = adapters.stage("nlp/sql", NAMES[store.scheme], "", "")
    assert (first.source, first.revision) == (NAMES[store.scheme], "")
    assert adapters.stage("nlp/sql", "", "", "") == first
    assert [request for request in store.requests if request.startswith("GET")] == [
        f"GET bucket/team/a/nlp/sql/{name}" for name in (CONFIG, TENSORS)
    ]
    store.push("bucket/team/a/nlp/sql", retrained)
    assert adapters.stage("nlp/sql", "", "", "").digest != first.digest


def test_an_adapter_is_the_same_as_in_a_directory_including_its_texts(
    store: StandInStore, files: dict[str, bytes], tmp_path: Path
):
    text = {
        "chat_template.jinja": b"one",
        "tokenizer_config.json": b'{"eos_token": "<|end|>"}',
        "additional_chat_templates/tool_use.jinja": b"two",
    }
    save_adapter(tmp_path / "sql")
    (tmp_path / "sql" / "additional_chat_templates").mkdir()
    for name, data in text.items():
        (tmp_path / "sql" / name).write_bytes(data)
    store.push("bucket/team/a/sql", {**files, **text, "checkpoint-1/chat_template.jinja": b"three"})
    directory = LocalSource(tmp_path)
    local, remote = stage(store, "sql", "local", (directory,)), stage(store, "sql")
    assert remote.text.chat_templates == {"default": "one", "tool_use": "two"}
    assert remote.text.special_tokens == {"eos_token": "<|end|>"}
    assert (local.digest, local.text) == (remote.digest, remote.text)
    assert stage(store, "sql", "", (directory,)).source == "local"


@pytest.mark.parametrize("id", ["sql v2", "a=b&c", "Müller-Straße", "100%", "a%20b", "it's #1 (new)", "a+b"])
def test_names_may_contain_special_characters(store: StandInStore, files: dict[str, bytes], id: str):
    store.push(f"bucket/team/a/{id}", files)
    assert stage(store, id).lora_rank == 4


def test_a_url_under_the_servers_own_is_a_name(store: StandInStore, files: dict[str, bytes]):
    store.push("bucket/team/a/sql", files)
    store.push("bucket/team/b/sql", files)
    store.push("other/team/a/sql", files)
    assert stage(store, f"{store.scheme}://bucket/team/a/sql").digest == stage(store, "sql").digest
    asked = len(store.requests)
    for address in ("bucket/team/b/sql", "other/team/a/sql", "bucket/team/a/../b/sql", "bucket/team/a/"):
        with pytest.raises(AdapterNotFoundError, match="not a name under this server's --adapters-"):
            stage(store, f"{store.scheme}://{address}")
    with pytest.raises(AdapterNotFoundError):
        stage(store, "file:///bucket/team/a/sql")
    assert len(store.requests) == asked


def test_a_bucket_that_may_be_read_but_not_listed_is_enough(store: StandInStore, files: dict[str, bytes]):
    store.push("bucket/team/a/sql", {**files, "chat_template.jinja": b"one"})
    store.listed = False
    assert stage(store, "sql").text.chat_templates == {"default": "one"}
    with pytest.raises(AdapterNotFoundError):
        stage(store, "other")


def test_adapters_that_a_store_does_not_have_are_looked_up_on_the_hub(
    store: StandInStore, files: dict[str, bytes], tmp_path: Path
):
    with StandInHub() as hub:
        hub.push("org/adapter", files)
        sources = [source_of(store), HubSource(hub.url, tmp_path)]
        adapters = AdapterStore(layouts(), torch.float32, torch.device("cpu"), BASE, sources)
        assert adapters.stage("org/adapter", "", "", "").source == "hub"
        with pytest.raises(AdapterNotFoundError, match=r"has no adapter 'sql'; .* org/name"):
            adapters.stage("sql", "", "", "")


@pytest.mark.parametrize("id", ["", "/", "../other", "a/../b", "a//b", ".hidden", "a/b/c/d/e", "sql?versionId=1"])
def test_an_id_cannot_point_outside_the_prefix(store: StandInStore, id: str):
    with pytest.raises(AdapterNotFoundError):
        stage(store, id)
    assert store.requests == []


def test_failures_have_typed_errors(store: StandInStore, files: dict[str, bytes]):
    store.push("bucket/team/a/sql", files)
    with pytest.raises(AdapterNotFoundError, match="no revisions"):
        source_of(store).locate("sql", "v1", "")
    store.push("bucket/team/a/secret", files)
    store.hidden = {"bucket/team/a/secret/" + CONFIG}
    with pytest.raises(AdapterForbiddenError, match="secret"):
        stage(store, "secret")
    store.push("bucket/team/a/pickled", {CONFIG: files[CONFIG], PICKLE: b"cos"})
    with pytest.raises(AdapterInvalidError, match="pickle"):
        stage(store, "pickled")
    store.push("bucket/team/a/half", {CONFIG: files[CONFIG]})
    with pytest.raises(AdapterInvalidError, match=TENSORS):
        stage(store, "half")
    for status, error, reason in (
        (400, AdapterSourceError, "answered 400"),
        (401, AdapterForbiddenError, "does not let this server read"),
        (404, AdapterNotFoundError, "no such bucket"),
        (503, AdapterSourceError, "answered 503"),
    ):
        store.failure = status
        with pytest.raises(error, match=reason):
            stage(store, "sql")


def test_refused_credentials_are_distinguished_from_a_foreign_bucket(store: StandInStore, files: dict[str, bytes]):
    store.push("bucket/team/a/sql", files)
    store.authorization = "of somebody else"
    with pytest.raises(AdapterForbiddenError, match=r"\(AuthenticationFailed\)"):
        stage(store, "sql")


def test_files_that_change_between_listing_and_reading_are_not_mixed(
    store: StandInStore, files: dict[str, bytes], retrained: dict[str, bytes]
):
    store.push("bucket/team/a/sql", files)
    origin = source_of(store).locate("sql", "", "")
    store.push("bucket/team/a/sql", {TENSORS: retrained[TENSORS]})
    with pytest.raises(AdapterSourceError, match="try again"):
        origin.read()


def test_an_interrupted_download_resumes(store: StandInStore, files: dict[str, bytes]):
    store.push("bucket/team/a/sql", files)
    whole = source_of(store).locate("sql", "", "").read()
    store.cut = 10
    assert source_of(store).locate("sql", "", "").read() == whole


def test_a_busy_store_is_asked_again(store: StandInStore, files: dict[str, bytes], caplog: pytest.LogCaptureFixture):
    store.push("bucket/team/a/sql", files)
    store.busy = 3
    assert stage(store, "sql").lora_rank == 4
    assert caplog.text.count("answered 503 for 'sql'; trying again in") == 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_will_not_change_is_not_asked_again(store: StandInStore, files: dict[str, bytes], status: int):
    store.push("bucket/team/a/sql", files)
    store.failure = status
    store.listed = False
    with pytest.raises(AdapterError):
        stage(store, "sql")
    assert len(store.requests) == len(set(store.requests))


def test_what_arrives_damaged_is_fetched_again_and_then_refused(
    store: StandInStore, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
):
    store.push("bucket/team/a/sql", files)
    store.damaged = 2
    whole = source_of(store).locate("sql", "", "").read()
    assert bytes(whole.tensors) == files[TENSORS]
    assert caplog.text.count("arrived damaged: its MD5 is") == 2
    store.push("bucket/team/a/other", {CONFIG: files[CONFIG], TENSORS: files[TENSORS] + b" "})
    store.damaged = 100
    with pytest.raises(AdapterSourceError, match=f"{CONFIG} of 'other' arrived damaged: its MD5 is .*, but .* says"):
        stage(store, "other")


def test_what_google_has_composed_of_parts_is_compared_by_its_crc32c(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
):
    for name in ("GOOGLE_BASE_URL", "GOOGLE_BEARER_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with StandInComposedGCS(monkeypatch) as gcs:
        gcs.push("bucket/team/a/sql", files)
        gcs.damaged = 1
        assert bytes(source_of(gcs).locate("sql", "", "").read().tensors) == files[TENSORS]
        assert caplog.text.count("arrived damaged: its CRC32C is") == 1
        gcs.push("bucket/team/a/other", {CONFIG: files[CONFIG], TENSORS: files[TENSORS] + b" "})
        gcs.damaged = 100
        with pytest.raises(AdapterSourceError, match=f"{CONFIG} of 'other' arrived damaged: its CRC32C is .*, but"):
            stage(gcs, "other")


@pytest.mark.parametrize("size", [5 << 20, 1000])
def test_what_was_uploaded_in_parts_is_compared_by_its_etag_or_arrives_the_same_twice(
    s3: StandInS3, files: dict[str, bytes], size: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(s3, "tag", lambda data: tag_of_parts(data, size))
    s3.push("bucket/team/a/sql", files)
    s3.damaged = 1
    whole = source_of(s3).locate("sql", "", "").read()
    assert (whole.config, bytes(whole.tensors)) == (files[CONFIG], files[TENSORS])
    assert "arrived damaged: its parts have another ETag" in caplog.text
    s3.push("bucket/team/a/other", {CONFIG: files[CONFIG], TENSORS: files[TENSORS] + b" "})
    asked, s3.more_headers = len(s3.requests), {"x-amz-server-side-encryption": "aws:kms"}
    monkeypatch.setattr(s3, "tag", lambda data: tag_of_parts(b"encrypted" + data, size))
    assert bytes(source_of(s3).locate("other", "", "").read().tensors) == files[TENSORS] + b" "
    assert sum(request.startswith("GET") for request in s3.requests[asked:]) == len(files)


@pytest.mark.parametrize(("size", "part"), [(1, 8), (9 << 20, 8), (40 << 20, 14)])
def test_the_etag_of_parts_is_known_for_usual_sizes_and_for_the_next_whole_mib(size: int, part: int):
    data = random.Random(size).randbytes(size)
    tag = tag_of_parts(data, part << 20)
    assert is_of_parts(tag)
    assert has_tag(BytesIO(data), size, tag)
    assert not has_tag(BytesIO(data[:-1] + b"?"), size, tag)
    assert not any(map(is_of_parts, (f'"{hashlib.md5(data).hexdigest()}"', '"0x8D-1"', "", '"CJ+-1"')))


def tag_of_parts(data: bytes, size: int) -> str:
    parts = [data[start : start + size] for start in range(0, max(len(data), 1), size)]
    return f'"{hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).hexdigest()}-{len(parts)}"'


@pytest.mark.parametrize(
    "header",
    [
        {"x-amz-server-side-encryption": "aws:kms"},
        {"x-amz-server-side-encryption-customer-algorithm": "AES256"},
    ],
)
def test_the_etag_of_what_a_users_key_encrypts_is_not_an_md5(
    s3: StandInS3, files: dict[str, bytes], header: dict[str, str]
):
    s3.push("bucket/team/a/sql", files)
    s3.salt = b"encrypted"
    with pytest.raises(AdapterSourceError, match="damaged"):
        stage(s3, "sql")
    s3.more_headers = header
    assert stage(s3, "sql").lora_rank == 4


def test_downloads_are_kept_on_disk_for_other_processes(store: StandInStore, files: dict[str, bytes], cache: Path):
    store.push("bucket/team/a/sql", files)
    first = stage(store, "sql")
    asked = len(store.requests)
    assert stage(store, "sql") == first
    assert [request.partition(" ")[0] for request in store.requests[asked:]] == ["LIST"]
    assert sorted(path.stat().st_size for path in cache.iterdir()) == sorted(map(len, files.values()))


def test_the_least_recently_used_downloads_leave_a_disk_that_fills(
    store: StandInStore, files: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
):
    names, size = ("a", "b", "c"), sum(map(len, files.values()))

    def usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=5 * size - sum(path.stat().st_size for path in cache.iterdir()))

    monkeypatch.setattr(file_cache.shutil, "disk_usage", usage)
    for name in names:
        store.push(f"bucket/team/a/{name}", files)
    for name in ("a", "b", "a", "c"):
        stage(store, name)
    store.requests.clear()
    for name in ("a", "c", "b"):
        stage(store, name)
    assert {request.split("/")[-2] for request in store.requests if request.startswith("GET")} == {"b"}


def test_a_file_that_is_too_large_is_not_downloaded(
    store: StandInStore, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(limits.SIZE_LIMITS, TENSORS, 10)
    store.push("bucket/team/a/sql", files)
    with pytest.raises(AdapterInvalidError, match="the limit is 10"):
        stage(store, "sql")
    assert not any(request.startswith("GET") for request in store.requests)


def test_the_listing_of_a_folder_with_too_many_objects_stops(
    store: StandInStore, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(object_store, "MOST_LISTED", 1)
    store.push("bucket/team/a/sql", files)
    with pytest.raises(AdapterInvalidError, match="more than 1 objects"):
        stage(store, "sql")


@pytest.mark.parametrize("listens", [True, False])
def test_a_silent_or_unreachable_store_is_given_up_without_showing_credentials(
    s3: StandInS3, monkeypatch: pytest.MonkeyPatch, listens: bool
):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(10)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1] if listens else 9}")
        with pytest.raises(AdapterSourceError, match="does not answer" if listens else "cannot be reached") as failure:
            source_of(s3, timeout_s=0.1).locate("sql", "", "")
    error = failure.value
    assert error.__cause__ is None
    assert "AKIDSTANDIN" not in str(error)
    assert SECRET not in str(error)


def test_missing_credentials_are_reported(s3: StandInS3, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(AdapterSourceError, match="has no credentials"):
        source_of(s3, timeout_s=0.1).locate("sql", "", "")


def test_the_aws_commands_files_are_read(
    s3: StandInS3, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    keys = f"aws_access_key_id = AKIDSTANDIN\naws_secret_access_key = {SECRET}\n"
    (tmp_path / ".aws" / "credentials").write_text(f"[default]\naws_access_key_id = x\n[work]\n{keys}")
    (tmp_path / ".aws" / "config").write_text("[profile work]\nregion = eu-west-1\n[profile login]\nsso_session = a\n")
    s3.push("bucket/team/a/sql", files)
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert stage(s3, "sql").source == "s3"
    monkeypatch.setenv("AWS_PROFILE", "login")
    with pytest.raises(SettingsError, match=r"adapters_s3: AWS_PROFILE: .* export-credentials"):
        open_sources(ModelSettings(adapters_s3="s3://bucket/team/a"))


def test_a_custom_certificate_authority_is_trusted(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    with StandInS3(monkeypatch, tls) as store:
        store.push("bucket/team/a/sql", files)
        with pytest.raises(AdapterSourceError, match="cannot be reached"):
            stage(store, "sql")
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
        assert stage(store, "sql").source == "s3"


@pytest.mark.parametrize(
    ("id", "source", "reason"),
    [
        ("there", "", ""),
        ("org/name", "", ""),  # the hub may have it
        ("there", "local", ""),
        ("absent", "local", "the adapter directory has no 'absent'"),
        ("s3://bucket/a", "", ""),
        ("s3://elsewhere/a", "s3", "'s3://elsewhere/a' is not a name under this server's --adapters-s3"),
        ("s3://bucket/a/b/c/d/e", "s3", "is not a name under"),
        ("ftp://host/a", "", "names on the hub have the form org/name"),
        ("name", "hub", "names on the hub have the form org/name"),
        ("a", "ftp", "this server has no adapter source 'ftp'; this server's adapter sources are local, s3, hub"),
        ("a", "gcs", "this server has no adapter source 'gcs'"),
    ],
)
def test_what_no_source_can_have_is_known_without_asking_over_the_network(
    tmp_path: Path, id: str, source: str, reason: str
):
    (tmp_path / "there").mkdir()
    found = refusal(open_sources(ModelSettings(adapters=tmp_path, adapters_s3="s3://bucket")), id, source)
    assert reason in found if reason else not found


def test_sources_have_the_order_in_which_they_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = ModelSettings(
        adapters=tmp_path,
        adapters_s3="s3://bucket",
        adapters_gcs="gs://bucket/a",
        adapters_azure="az://container/a",
    )
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert [source.name for source in open_sources(settings)] == ["local", "s3", "gcs", "azure", "hub"]
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    with pytest.raises(SettingsError, match=r"adapters_azure: .*[Aa]ccount"):
        open_sources(settings)
    monkeypatch.setenv("AWS_CA_BUNDLE", "/nonexistent/ca.pem")
    with pytest.raises(SettingsError, match=r"adapters_s3: .*/nonexistent/ca\.pem"):
        open_sources(settings)


@pytest.mark.parametrize(
    "url", ["bucket", "s3://", "s3://UPPER/x", "https://bucket/x", "s3://bucket/a b", "gs://bucket"]
)
def test_a_setting_that_is_not_a_url_is_refused(url: str):
    with pytest.raises(ValueError, match="adapters_s3"):
        ModelSettings(adapters_s3=url)
