"""The list of the adapter directory: valid adapters can be requested, and others have a reason."""

import json
import os
import shutil
import unicodedata
from functools import partial
from pathlib import Path

import pytest
import torch

from loraplex_protos.adapter_names import is_name
from loraplex_protos.errors import AdapterNotFoundError
from loraplex_shard.lora import listing
from loraplex_shard.lora.listing import LocalAdapter, LocalListing
from loraplex_shard.lora.peft.doubts import find_doubts
from loraplex_shard.lora.peft.forms import modules_in_any_form
from loraplex_shard.lora.peft.invocation import read_invocation
from loraplex_shard.lora.peft.reading import check_shapes
from loraplex_shard.lora.sources.files import CONFIG, MLX_TENSORS, PICKLE, TENSORS
from loraplex_shard.lora.sources.local import LocalSource
from loraplex_shard.lora.store import AdapterStore
from tests.shard.lora_models import BASE, edit_config, layouts, save_adapter

NFC, NFD = (unicodedata.normalize(form, "Müller-Straße") for form in ("NFC", "NFD"))
GOOD = ["sql v2", "a=b", "team@2024-01", "naïve", NFC, "日本語", "100%", "a%20b", "it's (new)", "-x", "a:b", "_+~#&!"]
BAD = {
    "a,b": "it has ','",
    "a*": "it has '*'",
    "what?": "it has '?'",
    "[x]": "it has '['",
    "back\\slash": r"it has '\\'",
    " leading": "begins or ends with a space",
    "trailing ": "begins or ends with a space",
    ".hidden": "a part begins with a dot",
    "tab\there": "it has the character U+0009",
    "line\nbreak": "it has the character U+000A",
    "a/b/c/d/e": "it has 5 parts",
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sound")
    save_adapter(directory, target_modules=["q_proj"])
    edit_config(directory, base_model_name_or_path=None)
    return directory


def store_of(root: Path) -> AdapterStore:
    return AdapterStore(layouts(), torch.float32, torch.device("cpu"), BASE, [LocalSource(root)])


def listing_of(root: Path | None) -> LocalListing:
    doubts = partial(find_doubts, base=BASE, modules=modules_in_any_form(layouts(), BASE.architecture))
    check = partial(check_shapes, layouts=layouts(), base=BASE)
    return LocalListing(root, doubts, partial(read_invocation, base=BASE), check)


def listed(root: Path) -> dict[str, LocalAdapter]:
    return {adapter.id: adapter for adapter in listing_of(root).adapters()}


@pytest.mark.parametrize("name", [*GOOD, "org/sql v2", "a/b/c/d"])
def test_a_sound_adapter_is_listed_and_found_by_its_name(name: str, sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / name)
    assert listed(tmp_path) == {name: LocalAdapter(name)}
    assert store_of(tmp_path).stage(name, "", "", "").source == "local"


@pytest.mark.parametrize("name", BAD)
def test_folders_with_invalid_names_are_listed_with_the_rule(name: str, sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / name)
    fault = listed(tmp_path)[name].fault
    assert f"{BAD[name]}: a name has 1 to 4 parts" in fault
    with pytest.raises(AdapterNotFoundError):
        store_of(tmp_path).stage(name, "local", "", "")


def test_a_folder_name_that_is_not_text_is_listed_escaped(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    assert "it is not UTF-8: a name has" in listed(tmp_path)["caf\\xe9"].fault


@pytest.mark.parametrize("on_disk", [NFC, NFD])
def test_both_forms_of_an_umlaut_are_the_same_name(on_disk: str, sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "org" / on_disk)
    assert list(listed(tmp_path)) == [f"org/{NFC}"]
    assert store_of(tmp_path).stage(f"org/{NFC}", "", "", "").source == "local"


def spoil(folder: Path, kind: str) -> None:
    tensors = folder / TENSORS
    match kind:
        case "no tensors":
            tensors.unlink()
        case "no config":
            (folder / CONFIG).unlink()
        case "a pickle":
            tensors.rename(folder / PICKLE)
        case "MLX's whole model":
            tensors.rename(folder / MLX_TENSORS)
            (folder / CONFIG).write_text('{"fine_tune_type": "full"}')
        case "a config that is not JSON":
            (folder / CONFIG).write_text("{")
        case "KaSA":
            edit_config(folder, kasa_config={"beta": 0.1})
        case "cut short":
            tensors.write_bytes(tensors.read_bytes()[:-10])
        case "empty":
            tensors.write_bytes(b"")
        case "a pointer of git lfs":
            tensors.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345678\n")
        case "tensors elsewhere":
            shutil.move(tensors, folder.parent.parent / TENSORS)
            tensors.symlink_to(folder.parent.parent / TENSORS)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("no tensors", f"{TENSORS} is missing"),
        ("no config", f"{CONFIG} is missing"),
        ("a pickle", "is a pickle file"),
        ("MLX's whole model", "fine_tune_type 'full'"),
        ("a config that is not JSON", CONFIG),
        ("KaSA", "kasa_config"),
        ("cut short", "cut short: 10 bytes are missing"),
        ("empty", "cut short: it has 0 bytes"),
        ("a pointer of git lfs", "a Git LFS pointer"),
        ("tensors elsewhere", "a link that leads out of the adapter directory"),
    ],
)
def test_a_broken_adapter_is_listed_with_its_reason_until_it_is_repaired(
    kind: str, reason: str, sound: Path, tmp_path: Path
) -> None:
    root = tmp_path / "adapters"
    shutil.copytree(sound, root / "a")
    spoil(root / "a", kind)
    names = listing_of(root)
    assert reason in names.adapters()[0].fault
    shutil.rmtree(root / "a")
    shutil.copytree(sound, root / "a")
    assert names.adapters() == [LocalAdapter("a")]


def test_warnings_are_listed_before_anything_is_loaded(sound: Path, tmp_path: Path) -> None:
    edit_config(shutil.copytree(sound, tmp_path / "a"), base_model_name_or_path="org/other-3b")
    assert "org/other-3b" in listed(tmp_path)["a"].warnings[0]


def test_unchanged_folders_are_not_read_again(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    headers = listing.read_headers
    monkeypatch.setattr(listing, "read_headers", lambda paths: read.append(paths) or headers(paths))
    for number in range(3):
        shutil.copytree(sound, tmp_path / str(number))
    names = listing_of(tmp_path)
    assert names.adapters() == names.adapters()
    assert len(read) == 3
    edit_config(tmp_path / "1", r=4, lora_alpha=3)
    names.adapters()
    assert len(read) == 4


def test_thousands_of_new_adapters_are_listed_at_once_and_checked_later(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        shutil.copytree(sound, tmp_path / str(number))
    (tmp_path / "2" / CONFIG).write_text("{")
    names = listing_of(tmp_path)
    monkeypatch.setattr(listing, "LOOK_SECONDS", -1.0)
    assert names.adapters() == [LocalAdapter("0"), LocalAdapter("1"), LocalAdapter("2")]
    monkeypatch.setattr(listing, "LOOK_SECONDS", 60.0)
    assert [bool(adapter.fault) for adapter in names.adapters()] == [False, False, True]


def test_links_are_only_followed_within_the_directory(sound: Path, tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    shutil.copytree(sound, root / "a")
    (root / "link").symlink_to("a")
    (root / "outside").symlink_to(sound)
    (root / "circle").symlink_to(root)
    (root / "itself").symlink_to("itself")
    found = listed(root)
    assert found.keys() == {"a", "link", "outside"}
    assert (found["link"].fault, "leads out" in found["outside"].fault) == ("", True)
    with pytest.raises(AdapterNotFoundError):
        store_of(root).stage("outside", "local", "", "")


def test_a_copy_of_the_hubs_cache_holds_adapters_by_their_hub_ids(sound: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--sql"
    for commit, r in (("c0", 3), ("c1", 4)):
        shutil.copytree(sound, repository / "snapshots" / commit)
        edit_config(repository / "snapshots" / commit, lora_alpha=r)
    blobs = repository / "blobs"
    blobs.mkdir()
    shutil.move(repository / "snapshots" / "c0" / TENSORS, blobs / "b0")
    (repository / "snapshots" / "c0" / TENSORS).symlink_to("../../blobs/b0")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0")
    assert listed(tmp_path) == {"org/sql": LocalAdapter("org/sql")}
    store = store_of(tmp_path)
    first = store.stage("org/sql", "", "", "")
    assert first.source == "local"
    (repository / "refs" / "main").write_text("c1")
    assert store.stage("org/sql", "", "", "").digest != first.digest


def test_folders_may_appear_and_disappear_while_the_server_runs(sound: Path, tmp_path: Path) -> None:
    names = listing_of(tmp_path / "adapters")
    assert names.adapters() == []
    shutil.copytree(sound, tmp_path / "adapters" / "late")
    assert names.adapters() == [LocalAdapter("late")]
    assert json.loads((tmp_path / "adapters" / "late" / CONFIG).read_text())
    shutil.rmtree(tmp_path / "adapters" / "late")
    assert names.adapters() == []


@pytest.mark.parametrize("name", ["", "/", "a//b", "../a", "a/../b", "a/.", "x" * 256, "/".join("abcde"), "a\x00b"])
def test_a_name_cannot_point_outside_the_directory(name: str) -> None:
    assert not is_name(name)


def test_without_a_directory_the_list_is_empty() -> None:
    assert (listing_of(None).adapters(), listing_of(None).count()) == ([], 0)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"use_dora": True}, "missing base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
        ({"lora_bias": True}, "missing base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"),
        ({"r": 7}, "lora_rank 7: adapter_config.json says so"),
        ({"target_modules": ["q_proj", "o_proj"]}, "missing base_model.model.model.layers.0.self_attn.o_proj.lora_A"),
        ({"modules_to_save": ["embed_tokens"]}, "missing base_model.model.model.embed_tokens.weight"),
        ({"trainable_token_indices": [99]}, "missing base_model.model.model.embed_tokens.token_adapter"),
        ({}, ""),
    ],
)
def test_what_a_header_shows_to_be_wrong_is_listed(
    sound: Path, tmp_path: Path, fields: dict[str, object], fault: str
) -> None:
    shutil.copytree(sound, tmp_path / "adapter")
    edit_config(tmp_path / "adapter", **fields)
    assert fault in listed(tmp_path)["adapter"].fault
    assert bool(listed(tmp_path)["adapter"].fault) == bool(fault)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
        {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
        {"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [2]}},
        {"rank_pattern": {"k_proj": 2}, "layers_to_transform": [1]},
    ],
)
def test_what_is_served_is_listed_without_a_fault(tmp_path: Path, options: dict[str, object]) -> None:
    save_adapter(tmp_path / "adapter", **options)
    assert listed(tmp_path)["adapter"].fault == ""
    store_of(tmp_path).stage("adapter", "", "", "")
