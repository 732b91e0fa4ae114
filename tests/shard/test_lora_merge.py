"""Merged adapters equal those of PEFT's add_weighted_adapter, on any number of ranks."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils import merge_utils
from transformers import LlamaForCausalLM

from loraplex_protos.errors import AdapterNotFoundError, AdapterSourceError, InvalidRequestError
from loraplex_shard.lora.merge import STRATEGIES, Recipe, keep_random, merge
from loraplex_shard.lora.sources.files import CONFIG, TENSORS
from loraplex_shard.lora.sources.local import LocalSource
from loraplex_shard.lora.store import AdapterStore
from loraplex_shard.lora.weights.deltas import Delta
from tests.shard.lora_models import (
    ALL_MODULES,
    ATTENTION,
    BASE,
    edit_config,
    layouts,
    save_adapter,
    whole_deltas,
)

DIGEST = "merged"
WEIGHTS = (0.7, -0.4, 1.5)
NAMES = ("first", "second", "third")
OPTIONS = {
    "first": {"target_modules": ALL_MODULES},
    "second": {"target_modules": ATTENTION, "lora_alpha": 37},
    "third": {"target_modules": ALL_MODULES, "lora_alpha": 3},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    for seed, (name, options) in enumerate(OPTIONS.items()):
        save_adapter(directory / name, seed=seed, **options)
    save_adapter(directory / "other-rank", seed=9, r=2)
    return directory


@pytest.fixture(scope="module")
def loaded(directory: Path) -> PeftModel:
    base = save_adapter(directory.parent / "unused").unload()
    assert isinstance(base, LlamaForCausalLM)
    model = PeftModel.from_pretrained(base, directory / "first", adapter_name="first")
    for name in NAMES[1:]:
        model.load_adapter(directory / name, adapter_name=name)
    return model


def merged_on(ranks: int, directory: Path, recipe: Recipe, names: tuple[str, ...] = NAMES) -> dict[str, torch.Tensor]:
    """The merged adapter's deltas, joined from stores that each hold one partition."""
    stores = [
        AdapterStore(layouts(rank, ranks), torch.float32, torch.device("cpu"), BASE, [LocalSource(directory)])
        for rank in range(ranks)
    ]
    for store in stores:
        store.merge(DIGEST, [store.stage(name, "local", "", "").digest for name in names], recipe)
        store.load(DIGEST, 1)
    return whole_deltas([store.adapter_in(1) for store in stores])


@pytest.mark.parametrize("ranks", [1, 2])
def test_parts_that_were_uploaded_are_merged_as_those_of_a_folder_are(directory: Path, ranks: int) -> None:
    recipe = Recipe((0.5, 1.5, -1.0), "ties", 0.5, "total")
    stores = [
        AdapterStore(layouts(rank, ranks), torch.float32, torch.device("cpu"), BASE, [LocalSource(directory)])
        for rank in range(ranks)
    ]
    contents = [{name: (directory / part / name).read_bytes() for name in (CONFIG, TENSORS)} for part in NAMES]
    sizes = [{name: len(data) for name, data in files.items()} for files in contents]
    for store in stores:
        uploads = [store.stage_upload(sizes[i], iter(contents[i].values())).digest for i in (0, 2)]
        parts = [uploads[0], store.stage(NAMES[1], "local", "", "").digest, uploads[1]]
        announced = {parts[i]: sizes[i] for i in (0, 2)}
        store.merge_uploads(DIGEST, parts, recipe, announced, iter([*contents[0].values(), *contents[2].values()]))
        store.load(DIGEST, 1)
    expected = merged_on(ranks, directory, recipe)
    torch.testing.assert_close(whole_deltas([store.adapter_in(1) for store in stores]), expected, rtol=0, atol=0)
    with pytest.raises(AdapterSourceError, match="have changed"):
        wrong = {parts[0]: sizes[1], parts[2]: sizes[2]}
        store.merge_uploads("other", parts, recipe, wrong, iter([*contents[1].values(), *contents[2].values()]))
    with pytest.raises(AdapterNotFoundError):
        store.merge("other", parts, recipe)


def merged_by_peft(model: PeftModel, recipe: Recipe) -> dict[str, torch.Tensor]:
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    model.add_weighted_adapter(
        list(NAMES),
        list(recipe.weights),
        "merged",
        combination_type=recipe.strategy,
        density=recipe.density,
        majority_sign_method=recipe.majority_sign_method,
    )
    modules = model.get_base_model().named_modules()
    return {name: m.get_delta_weight("merged").detach() for name, m in modules if hasattr(m, "get_delta_weight")}


@pytest.mark.parametrize("majority_sign_method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.65, 1.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.filterwarnings("ignore:The density:UserWarning")
def test_each_strategy_equals_pefts_on_any_number_of_ranks(
    directory: Path,
    loaded: PeftModel,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    density: float,
    majority_sign_method: str,
) -> None:
    # DARE keeps random values, so PEFT gets the same choice.
    monkeypatch.setattr(merge_utils, "random_pruning", lambda tensor, density, rescale: keep_random(tensor, density))
    recipe = Recipe(WEIGHTS, strategy, density, majority_sign_method)
    expected = merged_by_peft(loaded, recipe)
    for ranks in (1, 2, 3):
        actual = merged_on(ranks, directory, recipe)
        assert actual.keys() == expected.keys()
        for module, delta in expected.items():
            torch.testing.assert_close(actual[module], delta, msg=lambda text, module=module: f"{module}: {text}")


def test_random_pruning_keeps_the_fraction_and_the_mean_and_is_repeatable() -> None:
    tensor = torch.rand(400, 300, generator=torch.Generator().manual_seed(1)) + 1
    kept = keep_random(tensor, 0.3)
    assert (kept != 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert kept.mean().item() == pytest.approx(tensor.mean().item(), rel=0.03)
    assert torch.equal(kept, keep_random(tensor.clone(), 0.3))
    shifted = keep_random(tensor + 1, 0.3) != 0
    assert not torch.equal(shifted, kept != 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_single_adapter_is_only_weighted(directory: Path, strategy: str) -> None:
    once = merged_on(1, directory, Recipe((1.0,), strategy, 0.1, "total"), ("first",))
    twice = merged_on(1, directory, Recipe((2.0,), strategy, 0.1, "total"), ("first",))
    for module, delta in once.items():
        torch.testing.assert_close(twice[module], 2 * delta)


def test_rank_stabilized_adapters_are_merged_with_their_own_scale() -> None:
    a, b = torch.randn(4, 6), torch.randn(8, 4)
    merged = merge([{"m": Delta(a, b, scale=2.0)}], Recipe((1.0,), "linear", 1.0, "total"))["m"]
    torch.testing.assert_close(merged.b @ merged.a * merged.scale, 2.0 * b @ a)


def test_adapters_of_different_lora_ranks_are_refused_by_the_field(directory: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"merged_adapters.adapters: .*q_proj is 2 and 4"):
        merged_on(1, directory, Recipe((1.0, 1.0), "linear", 1.0, "total"), ("first", "other-rank"))


def test_adapters_that_are_not_staged_cannot_be_merged(directory: Path) -> None:
    store = AdapterStore(layouts(), torch.float32, torch.device("cpu"), BASE, [LocalSource(directory)])
    with pytest.raises(AdapterNotFoundError, match="not-staged"):
        store.merge(DIGEST, ["not-staged"], Recipe((1.0,), "linear", 1.0, "total"))


def test_files_that_changed_after_they_were_staged_are_not_merged(directory: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "first", seed=0)
    store = AdapterStore(layouts(), torch.float32, torch.device("cpu"), BASE, [LocalSource(tmp_path)])
    digest = store.stage("first", "local", "", "").digest
    edit_config(tmp_path / "first", lora_alpha=1)
    with pytest.raises(AdapterSourceError, match="load the adapter again"):
        store.merge(DIGEST, [digest], Recipe((1.0,), "linear", 1.0, "total"))


def test_a_merged_adapter_is_described_and_can_be_forgotten(directory: Path) -> None:
    store = AdapterStore(layouts(), torch.float32, torch.device("cpu"), BASE, [LocalSource(directory)])
    parts = [store.stage(name, "local", "", "") for name in ("first", "third")]
    staged = store.merge(DIGEST, [part.digest for part in parts], Recipe((1.0, 1.0), "linear", 1.0, "total"))
    assert (staged.digest, staged.source, staged.lora_rank) == (DIGEST, "merged", 4)
    assert staged.size_bytes == parts[0].size_bytes
    store.unstage(DIGEST)
    with pytest.raises(AdapterNotFoundError):
        store.load(DIGEST, 1)
