"""Adapters that PEFT makes for all linear layers of each architecture, under that architecture's names."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from loraplex_shard.device.parallel import Group
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.reading import read_adapter
from loraplex_shard.shapes.batch import Segment
from tests.shard.decoders import Sequences, load, load_reference, save_checkpoint
from tests.shard.families import FAMILIES
from tests.shard.lora_models import read

ANY = BaseModel("any")
TOKENS = [5, 80, 3, 3, 41, 7, 66, 0, 95, 12, 30]


def save_adapter(base: Path, directory: Path) -> torch.Tensor:
    """Saves an adapter on all linear layers except the head. Returns the logits of TOKENS with it."""
    model = load_reference(base)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        adapted = get_peft_model(model, config)
        adapted.save_pretrained(directory)
    with torch.inference_mode():
        logits: torch.Tensor = adapted(torch.tensor([TOKENS])).logits[0]
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_on_all_linear_layers_has_the_logits_of_peft(family: str, tmp_path: Path) -> None:
    base = save_checkpoint(FAMILIES[family], tmp_path / "base")
    expected, decoder = save_adapter(base, tmp_path / "adapter"), load(base, max_model_len=16)
    adapter = read_adapter(read(tmp_path / "adapter"), decoder.layouts, ANY, torch.float32)
    segments = (Segment(1, 1 + len(TOKENS), adapter.weights),)
    actual = Sequences(decoder).step({"plain": [3], "adapted": TOKENS}, segments)["adapted"]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    base_logits = load_reference(base)(torch.tensor([TOKENS])).logits[0]
    assert (expected - base_logits).abs().max() > 0.01


@pytest.mark.parametrize("family", ["phi3", "glm4", "granite 4"])
def test_each_rank_holds_its_rows_of_a_fused_module(family: str, tmp_path: Path) -> None:
    base = save_checkpoint(FAMILIES[family], tmp_path / "base")
    save_adapter(base, tmp_path / "adapter")
    files = read(tmp_path / "adapter")
    whole = load(base).layouts
    (fused,) = [part for layout in whole if layout.name == "layers.0.gate_up" for part in layout.parts]
    assert fused.rows == (slice(0, fused.out_features),)
    delta = torch.zeros(fused.out_features, 48)
    for rank in range(2):
        layouts = load(base, group=Group(rank, 2)).layouts
        (layout,) = [layout for layout in layouts if layout.name == "layers.0.gate_up"]
        layer = read_adapter(files, layouts, ANY, torch.float32).weights.layers[layout.name]
        (expansion,) = layer.expansions
        rows = torch.cat([torch.arange(run.start, run.stop) for run in layout.parts[0].rows])
        delta[rows] += expansion.weight.T @ layer.shrink
    (alone,) = [layout for layout in whole if layout.name == "layers.0.gate_up"]
    layer = read_adapter(files, whole, ANY, torch.float32).weights.layers[alone.name]
    torch.testing.assert_close(delta, layer.expansions[0].weight.T @ layer.shrink)
