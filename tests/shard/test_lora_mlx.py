"""An adapter in MLX-LM's format is served like the same adapter in PEFT's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.reading import read_adapter
from loraplex_shard.lora.sources.files import CONFIG, MLX_TENSORS, TENSORS
from loraplex_shard.lora.sources.local import LocalSource
from loraplex_shard.lora.weights.deltas import HostAdapter
from tests.shard.lora_models import ALL_MODULES, BASE, edit_config, layouts, save_adapter, whole_deltas

PREFIX = "base_model.model."
# What MLX-LM records about a training.
ARGUMENTS = {
    "adapter_path": "adapters",
    "batch_size": 4,
    "fine_tune_type": "lora",
    "lora_parameters": {"rank": 4, "dropout": 0.05, "scale": 20.0, "keys": ["self_attn.q_proj"]},
    "model": "mlx-community/base-7b-4bit",
    "num_layers": 16,
    "optimizer_config": {"adam": {}},
    "use_something": True,
}


def as_mlx(directory: Path, **arguments: object) -> Path:
    """The same adapter as MLX-LM would have saved it."""
    tensors = load_file(directory / TENSORS)
    ends = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b", ".lora_magnitude_vector": ".m"}
    renamed = {}
    for name, tensor in tensors.items():
        if ".base_layer." in name:  # PEFT saves the head of the base
            continue
        end = next(end for end in ends if name.endswith(end))
        renamed[name.removeprefix(PREFIX).removesuffix(end) + ends[end]] = tensor.t().contiguous()
    folder = shutil.copytree(directory, directory.with_name("mlx"))
    (folder / TENSORS).unlink()
    save_file(renamed, folder / MLX_TENSORS)
    (folder / CONFIG).write_text(json.dumps({**ARGUMENTS, **arguments}))
    return folder


def serve(folder: Path) -> HostAdapter:
    files = LocalSource(folder.parent).locate(folder.name, "", "").read()
    return read_adapter(files, layouts(), BASE, torch.float32)


@pytest.mark.parametrize(
    ("trained", "arguments"),
    [
        ({"target_modules": ALL_MODULES}, {}),
        ({"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 2]}, {"num_layers": 2}),
        ({"target_modules": ["o_proj"], "use_dora": True}, {"fine_tune_type": "dora"}),
    ],
    ids=["LoRA", "LoRA of the last layers", "DoRA"],
)
def test_an_mlx_adapter_is_the_same_as_pefts(
    trained: dict[str, object], arguments: dict[str, object], tmp_path: Path
) -> None:
    save_adapter(tmp_path / "peft", **trained)
    edit_config(tmp_path / "peft", lora_alpha=20.0 * 4)
    ours, theirs = serve(as_mlx(tmp_path / "peft", **arguments)), serve(tmp_path / "peft")
    actual, expected = whole_deltas([ours.weights]), whole_deltas([theirs.weights])
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[module], delta) for module, delta in expected.items())
    for name, layer in theirs.weights.layers.items():
        for own, other in zip(ours.weights.layers[name].expansions, layer.expansions, strict=True):
            assert (own.affine is None) == (other.affine is None)
            assert own.affine is None or torch.equal(own.affine, other.affine)
    assert ours.warnings == ()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type 'full': this is a model"),
        ({"fine_tune_type": "other"}, "fine_tune_type: Input should be"),
        ({"lora_parameters": None}, "lora_parameters: Input should be a valid dictionary$"),
        ({"lora_parameters": {"rank": 4}}, "lora_parameters.scale: Field required"),
        ({"lora_parameters": {"rank": 0, "scale": 1.0}}, "lora_parameters.rank"),
        ({"lora_parameters": {"rank": 4, "scale": float("inf")}}, "lora_parameters.scale"),
        ({"lora_parameters": {"rank": 4, "scale": 10.0, "alpha": 16.0}}, "set scale to the whole factor"),
        ({"lora_parameters": {"rank": 8, "scale": 10.0}}, "needs lora_rank 8: adapter_config.json says so"),
        ({"fine_tune_type": "dora"}, "missing .*lora_magnitude_vector"),
    ],
)
def test_mlx_adapters_that_cannot_be_served_are_named(
    arguments: dict[str, object], reason: str, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "peft", target_modules=["q_proj"])
    with pytest.raises(AdapterInvalidError, match=reason):
        serve(as_mlx(tmp_path / "peft", **arguments))


def test_tensors_of_another_model_are_named(tmp_path: Path) -> None:
    save_adapter(tmp_path / "peft", target_modules=["q_proj"])
    folder = as_mlx(tmp_path / "peft")
    tensors = load_file(folder / MLX_TENSORS)
    save_file({**tensors, "model.embed_tokens.lora_a": torch.zeros(50, 4)}, folder / MLX_TENSORS)
    with pytest.raises(AdapterInvalidError, match=r"embed_tokens\.lora_A"):
        serve(folder)
    save_file({name.replace("layers", "h"): tensor for name, tensor in tensors.items()}, folder / MLX_TENSORS)
    with pytest.raises(AdapterInvalidError, match="none of its tensors adapts a linear layer"):
        serve(folder)
