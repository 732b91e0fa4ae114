"""Each family of our own decoder with an adapter on all linear layers, cut over ranks and rounded on load, against
transformers and PEFT."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import pytest
import torch
from peft import LoraConfig, get_peft_model

from loraplex_shard.device.parallel import Group
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.reading import read_adapter
from loraplex_shard.settings import Quantize
from loraplex_shard.shapes.batch import Segment
from tests.shard.decoders import Sequences, load, load_reference, save_checkpoint
from tests.shard.families import FAMILIES
from tests.shard.lora_models import read
from tests.shard.thread_ranks import run_on_ranks

pytestmark = pytest.mark.slow

ANY = BaseModel("any")
TOKENS = [5, 80, 3, 3, 41, 7, 66, 0, 95, 12, 30]
# What rounding moves logits by, as a fraction of their length, where weights are at random and some tokens get other
# experts by it.
ROUNDING: dict[Quantize, float] = {"none": 1e-4, "int8": 0.2, "int4": 0.8}

_loading = Lock()  # making a model changes torch for all threads


@dataclass(frozen=True)
class Trained:
    base: Path
    adapter: Path
    expected: torch.Tensor  # logits of TOKENS by the base, and with the adapter


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp("family")
    base, adapter = save_checkpoint(FAMILIES[request.param], directory / "base"), directory / "adapter"
    with torch.inference_mode():
        plain = load_reference(base)(torch.tensor([TOKENS])).logits[0]
    adapted = _train(base, adapter)
    assert (adapted - plain).abs().max() > 0.01
    return Trained(base, adapter, torch.stack((plain, adapted)))


def _train(base: Path, directory: Path) -> torch.Tensor:
    """Saves an adapter on all linear layers except the head. Returns the logits of TOKENS with it."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        adapted = get_peft_model(load_reference(base), config)
        adapted.save_pretrained(directory)
    with torch.inference_mode():
        logits: torch.Tensor = adapted(torch.tensor([TOKENS])).logits[0]
    return logits


@pytest.mark.parametrize(("ranks", "quantize"), [(1, "none"), (2, "none"), (3, "int8"), (4, "none"), (1, "int4")])
def test_a_family_has_the_logits_of_transformers(trained: Trained, ranks: int, quantize: Quantize) -> None:
    def logits(group: Group) -> list[torch.Tensor]:
        with _loading:
            decoder = load(trained.base, group=group, quantize=quantize, max_model_len=16)
        weights = read_adapter(read(trained.adapter), decoder.layouts, ANY, torch.float32).weights
        segments = (Segment(len(TOKENS), 2 * len(TOKENS), weights),)
        return list(Sequences(decoder).step({"base": TOKENS, "adapted": TOKENS}, segments).values())

    first, *others = run_on_ranks(ranks, logits)
    assert others == [[]] * (ranks - 1)
    actual = torch.stack(first)
    moved = (actual - trained.expected).norm(dim=(1, 2)) / trained.expected.norm(dim=(1, 2))
    assert float(moved.max()) < ROUNDING[quantize]


@pytest.mark.parametrize("family", ["phi3", "glm4", "granite 4"])
def test_each_rank_holds_its_rows_of_a_fused_module(family: str, tmp_path: Path) -> None:
    base = save_checkpoint(FAMILIES[family], tmp_path / "base")
    _train(base, tmp_path / "adapter")
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
