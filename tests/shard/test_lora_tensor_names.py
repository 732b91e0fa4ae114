"""An adapter's tensors are recognized under the names of all trainers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft import tensor_names
from loraplex_shard.lora.peft.reading import read_adapter, read_deltas
from loraplex_shard.lora.weights.deltas import HostAdapter
from tests.shard.lora_models import (
    BASE,
    HeldTensors,
    edit_config,
    edit_tensors,
    layouts,
    loaded_by_peft,
    make_base,
    peft_deltas,
    read,
    save_adapter,
    whole_deltas,
)

PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Rename = Callable[[str], str]

RENAMINGS: dict[str, Rename] = {
    "PEFT": lambda name: name,
    "a state dict with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "a state dict of an adapter called tuned": lambda name: name.replace(".weight", ".tuned.weight"),
    "DistributedDataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of the base": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "FSDP": lambda name: name.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
    "activation checkpoints": lambda name: name.replace(".mlp.", ".mlp._checkpoint_wrapped_module."),
    "PEFT around PEFT": lambda name: PREFIX + name,
    "without PEFT's prefix": lambda name: name.removeprefix(PREFIX),
    "a model without a head": lambda name: name.replace(f"{PREFIX}model.", PREFIX),
    "all at once": lambda name: f"module._orig_mod.{name.replace('.weight', '.default.weight')}",
}


def serve(directory: Path, rounded: bool = False) -> HostAdapter:
    base = dataclasses.replace(BASE, tensors=HeldTensors(make_base(), rounded))
    return read_adapter(read(directory), layouts(), base, torch.float32)


@pytest.mark.parametrize("rename", RENAMINGS.values(), ids=RENAMINGS.keys())
def test_tensors_are_found_under_all_names_that_trainers_write(rename: Rename, tmp_path: Path) -> None:
    model = save_adapter(tmp_path, target_modules=["q_proj", "down_proj"])

    def rename_all(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {rename(name): tensors[name] for name in list(tensors)}
        tensors.clear()
        tensors.update(renamed)

    edit_tensors(tmp_path, rename_all)
    actual, expected = whole_deltas([serve(tmp_path).weights]), peft_deltas(model)
    assert actual.keys() == expected.keys()
    assert all(torch.allclose(actual[module], delta) for module, delta in expected.items())


PARTS = ["base_model", "model", "language_model", "layers", "0", "12", "mlp", "up_proj", "lora_A", "lora_B", "default"]
PARTS += ["weight", "bias", "module", "_orig_mod", "_fsdp_wrapped_module", "lora_magnitude_vector", "", "Wqkv", "w1"]


@given(
    start=st.sampled_from(["", f"{PREFIX}model.layers.0.", f"{PREFIX}model.language_model.layers.3."]),
    middle=st.lists(st.sampled_from(PARTS), max_size=5),
    end=st.sampled_from([".lora_A.weight", ".lora_B.default.weight", ".lora_magnitude_vector", ""]),
    backbone=st.sampled_from(["model", "model.language_model"]),
)
def test_names_that_are_seen_to_be_pefts_own_are_as_the_rules_have_them(
    start: str, middle: list[str], end: str, backbone: str
) -> None:
    name = start + ".".join(middle) + end
    assert tensor_names.as_saved_by_peft([name], backbone) == {tensor_names._plain(name, backbone): name}


def test_an_adapter_of_tinkers_adapts_the_lm_head_under_the_name_that_it_has_there(tmp_path: Path) -> None:
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for folder in ("peft", "tinker"):
        save_adapter(tmp_path / folder, target_modules=[*linear, "lm_head"])
    edit_config(tmp_path / "tinker", target_modules="all-linear")
    head, theirs = f"{PREFIX}lm_head", f"{PREFIX}model.unembed_tokens"
    names = [f"{head}.lora_A.weight", f"{head}.lora_B.weight"]
    edit_tensors(
        tmp_path / "tinker",
        lambda tensors: tensors.update({name.replace(head, theirs): tensors.pop(name) for name in names}),
    )
    base = dataclasses.replace(BASE, tensors=HeldTensors(make_base(), False))
    expected, found = (read_deltas(read(tmp_path / folder), layouts(), base) for folder in ("peft", "tinker"))
    assert found.keys() == expected.keys() and "lm_head" in found
    assert all(torch.equal(found[name].b @ found[name].a, delta.b @ delta.a) for name, delta in expected.items())
    assert all(found[name].scale == delta.scale for name, delta in expected.items())


def test_two_names_for_one_tensor_are_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"])
    name = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.update({f"module.{name}": tensors[name].clone()}))
    with pytest.raises(AdapterInvalidError, match="are both"):
        serve(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        f"{PREFIX}model.layers.1.self_attn.k_proj.base_layer.weight",
        f"{PREFIX}model.embed_tokens.base_layer.weight",
        f"{PREFIX}lm_head.original_module.weight",
        f"{PREFIX}lm_head.modules_to_save.default.weight",
    ],
)
def test_a_base_tensor_is_ignored_if_it_equals_the_bases_and_refused_otherwise(name: str, tmp_path: Path) -> None:
    base = make_base().state_dict()
    save_adapter(tmp_path, target_modules=["q_proj"])
    plain = name.removeprefix(PREFIX)
    for infix in (".base_layer", ".original_module", ".modules_to_save.default"):
        plain = plain.replace(infix, "")
    for same in (base[plain], base[plain].bfloat16(), base[plain].half()):
        edit_tensors(tmp_path, lambda tensors, same=same: tensors.update({name: same.clone()}))
        actual, expected = whole_deltas([serve(tmp_path).weights]), loaded_by_peft(tmp_path)
        assert actual.keys() == expected.keys()
    trained = base[plain].clone()
    trained.view(-1)[3] += 0.01
    for other in (trained, base[plain][:-1].clone()):
        edit_tensors(tmp_path, lambda tensors, other=other: tensors.update({name: other}))
        with pytest.raises(AdapterInvalidError, match=name):
            serve(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.base_layer.weight",
        HEAD,
        EMBEDDING,
        "model.norm.weight",
        "model.layers.1.self_attn.q_proj.base_layer.weight",
    ],
)
def test_a_replaced_weight_of_the_base_is_served_unless_it_is_the_same(name: str, tmp_path: Path) -> None:
    module = name.removesuffix(".weight").removesuffix(".base_layer")
    save_adapter(tmp_path, target_modules=["q_proj", *["lm_head"] * ("lm_head.base_layer" in name)])
    own = make_base().state_dict()[f"{module}.weight"]

    def replaced(weight: torch.Tensor) -> bool:
        edit_tensors(tmp_path, lambda tensors: tensors.update({f"{PREFIX}{name}": weight.clone()}))
        weights = serve(tmp_path).weights
        whole = any(e.affine is not None for layer in weights.layers.values() for e in layer.expansions)
        return whole or bool(weights.own.tensors)

    assert not replaced(own)
    assert not replaced(own.bfloat16())
    assert replaced(own + 0.01)
    with pytest.raises(AdapterInvalidError, match=module):
        replaced(own[:-1])


def test_a_quantized_bases_weights_are_compared_as_closely_as_rounding_allows(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["lm_head"])
    name, weight = f"{PREFIX}lm_head.base_layer.weight", make_base().state_dict()[HEAD]
    noise = torch.randn(weight.shape) * weight.std()
    for tensor, replaces in (weight + 0.3 * noise, False), (noise, True):
        edit_tensors(tmp_path, lambda tensors, tensor=tensor: tensors.update({name: tensor}))
        (expansion,) = serve(tmp_path, rounded=True).weights.layers["lm_head"].expansions
        assert (expansion.affine is not None) == replaces
