"""Experts of models that run with transformers' modeling code: rounded, cut over ranks, and adapted as PEFT does it."""

import warnings
from pathlib import Path
from threading import Lock
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    DeepseekV2Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    PhimoeConfig,
    PreTrainedConfig,
)

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.device.parallel import Group
from loraplex_shard.kernels.library import instruction_set
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.reading import read_adapter
from loraplex_shard.models import Model
from loraplex_shard.models.transformers.model import TransformersModel
from loraplex_shard.settings import Quantize
from loraplex_shard.shapes.batch import Segment
from tests.shard.decoders import Sequences, load, load_reference, save_checkpoint
from tests.shard.lora_models import read
from tests.shard.operations import BLOCK_SIZE, cpu_operations
from tests.shard.test_expert_adapters import random, save
from tests.shard.thread_ranks import run_on_ranks
from tests.shard.tiny_classes import tiny_config

pytestmark = pytest.mark.slow

TOKENS = [5, 80, 3, 3, 41, 7, 66, 0, 95, 12, 30]
CONFIGS: list[type[PreTrainedConfig]] = [Glm4MoeConfig, DeepseekV2Config, Ernie4_5_MoeConfig, PhimoeConfig]
# What rounding moves logits by, as a fraction of their length, where some tokens get other experts by it.
ROUNDING: dict[Quantize, float] = {"int8": 0.4, "int4": 0.8}

_loading = Lock()  # making a model changes torch for all threads


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda config: config.model_type)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tiny_config(request.param.model_type), tmp_path_factory.mktemp("base"))


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([TOKENS])).logits[0]
    return logits


def served(model: Model, adapter: Path) -> torch.Tensor:
    base = BaseModel("", tensors=model.tensors, embedding=model.embedding_name, head=model.head_name)
    weights = read_adapter(read(adapter), model.layouts, base, torch.float32).weights
    segments = (Segment(2, 2 + len(TOKENS), weights),)
    found = Sequences(model, BLOCK_SIZE, 12).step({"plain": [3, 9], "adapted": TOKENS}, segments)
    return found.get("adapted", torch.empty(0))


def of_parameters(base: Path, directory: Path) -> torch.Tensor:
    """Saves an adapter of all experts, and returns PEFT's logits with it."""
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    options: dict[str, Any] = {"r": 3, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(target_modules=["o_proj"], target_parameters=parameters, **options)
        model = get_peft_model(load_reference(base), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.2)
        model.save_pretrained(directory)
    return logits_of(model)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_adapter_of_parameters_has_the_logits_of_peft(ranks: int, base: Path, tmp_path: Path) -> None:
    expected = of_parameters(base, tmp_path)

    def answer(group: Group) -> torch.Tensor:
        with _loading, patch.object(TransformersModel, "check_positions"):  # in it, ranks wait for each other
            model = load(base, group=group)
        return served(model, tmp_path)

    actual = run_on_ranks(ranks, answer)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert (expected - logits_of(load_reference(base))).abs().max() > 0.1


def test_the_kernels_compute_what_the_reference_does(base: Path, tmp_path: Path) -> None:
    expected = of_parameters(base, tmp_path)
    actual = served(load(base, ops=cpu_operations(instruction_set())), tmp_path)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("quantize", ROUNDING)
def test_experts_are_rounded_as_they_are_loaded(quantize: Quantize, base: Path) -> None:
    expected, model = logits_of(load_reference(base)), load(base, quantize=quantize)
    moved = (Sequences(model).step({"a": TOKENS})["a"] - expected).norm() / expected.norm()
    assert 0 < float(moved) < ROUNDING[quantize]
    exact = [expert.weight.matrix for expert in _experts(load(base))]
    rounded = [expert.weight.matrix for expert in _experts(model)]
    assert exact and not any(torch.equal(*pair) for pair in zip(exact, rounded, strict=True))


def _experts(model: Any) -> list[Any]:
    return [each for each in model._model.modules() if getattr(each, "layout", None) and each.layout.of_expert]


def test_an_adapter_by_expert_is_the_model_with_its_deltas_merged(tmp_path: Path) -> None:
    """As trainers wrote it before transformers made one tensor of all experts: of dense and shared ones as well."""
    base = save_checkpoint(tiny_config("glm4_moe"), tmp_path / "base")
    model, merged = load(base), load_reference(base)
    names = ["gate_proj", "up_proj", "down_proj"]
    tensors: dict[str, torch.Tensor] = {}
    for layout in model.layouts:
        start = 0
        for part in layout.parts:
            if part.module.rpartition(".")[2] in names:
                a, b = random(3, layout.in_features), random(part.out_features, 3)
                module = part.module.removeprefix("model.layers.")
                tensors |= {f"{module}.lora_A": a, f"{module}.lora_B": b}
                matrix = _matrix(merged, part.module)
                matrix[start : start + part.out_features] += 5 / 3 * b @ a
            start += part.out_features
    adapter = save(tmp_path / "adapter", tensors, target_modules=names)
    torch.testing.assert_close(served(model, adapter), logits_of(merged), rtol=1e-3, atol=1e-3)


def _matrix(model: Any, module: str) -> torch.Tensor:
    holder, _, leaf = module.rpartition(".")
    experts, _, number = holder.rpartition(".")
    if not number.isdigit():
        weight: torch.Tensor = model.get_submodule(module).weight.data
        return weight
    fused = getattr(model.get_submodule(experts), "down_proj" if leaf == "down_proj" else "gate_up_proj")
    of_expert: torch.Tensor = fused.data[int(number)]
    return of_expert


def test_experts_of_another_form_are_not_adapted_in_silence(tmp_path: Path) -> None:
    base = save_checkpoint(tiny_config("llama4_text"), tmp_path / "base")
    of_parameters(base, tmp_path / "adapter")
    with pytest.raises(AdapterInvalidError, match="target_parameters"):
        served(load(base), tmp_path / "adapter")


def test_adapters_of_routers_are_refused_with_the_reason(tmp_path: Path) -> None:
    """PEFT's all-linear has them."""
    base = save_checkpoint(tiny_config("qwen3_next"), tmp_path / "base")
    config = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(load_reference(base), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterInvalidError, match=r"mlp\.gate\.lora_A.*routers of experts take no adapter"):
        served(load(base), tmp_path / "adapter")
