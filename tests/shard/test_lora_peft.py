"""An adapter's weights, partitioned and joined again, equal what PEFT would add to the base's."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.config import AdapterConfig
from loraplex_shard.lora.peft.reading import read_adapter
from loraplex_shard.lora.peft.targets import find_targets
from loraplex_shard.lora.weights.deltas import HostAdapter
from tests.shard.lora_models import (
    ALL_MODULES,
    BASE,
    layouts,
    peft_deltas,
    read,
    save_adapter,
    whole_deltas,
)

MODULES = tuple(part.module for layout in layouts() for part in layout.parts)

VARIANTS = {
    "all modules": {"target_modules": ALL_MODULES},
    "all-linear": {"target_modules": "all-linear"},
    "rsLoRA": {"target_modules": ALL_MODULES, "use_rslora": True},
    "its own alpha": {"lora_alpha": 37},
    "regex": {"target_modules": r".*\.(1|2)\.(mlp\.(up|down)|self_attn\.k)_proj"},
    "only v": {"target_modules": ["v_proj"]},
    "full names": {"target_modules": ["model.layers.1.self_attn.v_proj", "layers.0.mlp.up_proj"]},
    "some layers": {"target_modules": ALL_MODULES, "layers_to_transform": [0, 2]},
    "one layer, by pattern": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {"target_modules": ALL_MODULES, "exclude_modules": ["lm_head", "1.mlp.up_proj"]},
    "excluded by regex": {"target_modules": ALL_MODULES, "exclude_modules": r".*\.[02]\..*"},
    # The order matters: patterns are tried in order, and PEFT writes them sorted.
    "rank_pattern": {"target_modules": ALL_MODULES, "rank_pattern": {r"layers\.1\..*_proj": 7, "q_proj": 3}},
    "alpha_pattern": {"alpha_pattern": {"model.layers.0.self_attn.k_proj": 5, "v_proj": 2}},
    "both patterns with rsLoRA": {
        "use_rslora": True,
        "rank_pattern": {"o_proj": 16, "^model.layers.2.self_attn.k_proj": 1},
        "alpha_pattern": {"o_proj": 3},
    },
}


def read_partitions(directory: Path, size: int, dtype: torch.dtype = torch.float32) -> list[HostAdapter]:
    return [read_adapter(read(directory), layouts(rank, size), BASE, dtype) for rank in range(size)]


def assert_same_deltas(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(actual[module], delta, msg=lambda text, module=module: f"{module}: {text}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_deltas_equal_pefts_on_any_number_of_ranks(tmp_path: Path, variant: str) -> None:
    expected = peft_deltas(save_adapter(tmp_path, **VARIANTS[variant]))
    for size in (1, 2, 3):
        cuts = read_partitions(tmp_path, size)
        assert_same_deltas(whole_deltas([cut.weights for cut in cuts]), expected)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("r", [1, 4, 8, 12, 16, 64, 512])
def test_deltas_equal_pefts_at_any_lora_rank(tmp_path: Path, r: int, use_rslora: bool) -> None:
    expected = peft_deltas(save_adapter(tmp_path, r=r, use_rslora=use_rslora, target_modules=ALL_MODULES))
    for size in (1, 2, 3):
        cuts = read_partitions(tmp_path, size)
        assert_same_deltas(whole_deltas([cut.weights for cut in cuts]), expected)
        assert {cut.lora_rank for cut in cuts} == {r}


def test_the_largest_lora_rank_is_reported(tmp_path: Path) -> None:
    save_adapter(tmp_path, r=4, rank_pattern={"k_proj": 9})
    assert {cut.lora_rank for cut in read_partitions(tmp_path, 3)} == {9}


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_any_float_dtype_is_converted_with_the_scale_applied_before_rounding(
    tmp_path: Path, stored: torch.dtype
) -> None:
    model = save_adapter(tmp_path, r=3, lora_alpha=7, dtype=stored)
    projection = model.get_base_model().model.layers[0].self_attn.o_proj
    a, b = projection.lora_A["default"].weight.detach(), projection.lora_B["default"].weight.detach()
    [cut] = read_partitions(tmp_path, 1, torch.bfloat16)
    layer = cut.weights.layers["layers.0.o"]
    assert layer.shrink.equal(a.to(torch.float32).to(torch.bfloat16))
    assert layer.expansions[0].weight.equal((b.to(torch.float32) * (7 / 3)).to(torch.bfloat16).T)


def test_weights_are_in_one_piece_of_memory_and_report_its_size(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=ALL_MODULES)
    for cut in read_partitions(tmp_path, 2):
        tensors = [
            tensor
            for layer in cut.weights.layers.values()
            for tensor in (layer.shrink, *(expansion.weight for expansion in layer.expansions))
        ]
        assert all(tensor.is_contiguous() for tensor in tensors)
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
        for tensor, after in pairwise(tensors):
            assert tensor.nbytes <= after.data_ptr() - tensor.data_ptr() < tensor.nbytes + 64
        used = sum(-(-tensor.nbytes // 64) * 64 for tensor in tensors)
        assert cut.weights.size_bytes == used + cut.weights.table.nbytes


def test_layers_that_the_adapter_does_not_touch_are_absent(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj", "down_proj"], layers_to_transform=[2])
    [cut] = read_partitions(tmp_path, 1)
    assert set(cut.weights.layers) == {"layers.2.qkv", "layers.2.down"}


names = st.sampled_from(
    [
        "q_proj",
        "v_proj",
        "up_proj",
        "self_attn.q_proj",
        "layers.1.mlp.up_proj",
        MODULES[3],
        "proj",
        "lm_head",
        "nothing",
    ]
)
expressions = st.sampled_from(
    [r".*", r".*q_proj", r".*\.1\..*", r"model\.layers\.[01]\.mlp\.(up|gate)_proj", "q_proj", "(?!model).*", "^lm_head"]
)


@settings(deadline=None, max_examples=40)
@given(
    target_modules=st.lists(names, min_size=1, max_size=4) | expressions,
    exclude_modules=st.none() | st.lists(names, max_size=2) | expressions,
    layers=st.none() | st.lists(st.integers(0, 4), max_size=3) | st.integers(0, 2),
    layers_pattern=st.none() | st.sampled_from(["layers", "model.layers", "h", "", ["h", "layers"]]),
    rank_pattern=st.dictionaries(names | expressions, st.integers(1, 512), max_size=3),
    alpha_pattern=st.dictionaries(names | expressions, st.integers(1, 64), max_size=3),
)
def test_targets_are_chosen_by_pefts_rules(
    target_modules: list[str] | str,
    exclude_modules: list[str] | str | None,
    layers: list[int] | int | None,
    layers_pattern: list[str] | str | None,
    rank_pattern: dict[str, int],
    alpha_pattern: dict[str, int],
) -> None:
    fields = {
        "target_modules": target_modules,
        "exclude_modules": exclude_modules,
        "layers_to_transform": layers if isinstance(target_modules, list) else None,
        "layers_pattern": layers_pattern if isinstance(target_modules, list) and layers is not None else None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    theirs = LoraConfig(**fields)
    expected = {}
    for module in (*MODULES, "model.embed_tokens"):
        found = check_target_module_exists(theirs, module)
        if found and not isinstance(found, _ExcludedModule):
            r = rank_pattern.get(get_pattern_key(rank_pattern, module), 8)
            alpha = alpha_pattern.get(get_pattern_key(alpha_pattern, module), 16)
            expected[module] = (r, alpha / r)
    ours = AdapterConfig.model_validate({"peft_type": "LORA", "r": 8, "lora_alpha": 16.0, **fields})
    if not expected:
        with pytest.raises(AdapterInvalidError, match="target_modules"):
            find_targets(ours, MODULES)
    else:
        targets = find_targets(ours, MODULES)
        assert {module: (target.lora_rank, target.scale) for module, target in targets.items()} == expected
