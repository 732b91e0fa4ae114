"""Checkpoints and adapters for the end-to-end tests, which are created once."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import IA3Config, LoHaConfig, VeraConfig

from tests.e2e.processes import Server
from tests.e2e.tiny import (
    ALL_LINEAR,
    Oracle,
    byte_tokenizer,
    save_adapter,
    save_chanting_model,
    save_model,
    save_other_adapter,
)
from tests.shard.lora_models import edit_config

INVOCATION = "brown"
ACTIVATED = [f"activated{number}" for number in range(1, 6)]
LORA_RANKS = {"r1": 1, "r4": 4, "r8": 8, "r12": 12, "r16": 16, "r64": 64}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def chanting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chanting_model(tmp_path_factory.mktemp("chanting-llama"))


@pytest.fixture(scope="session")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of different lora_ranks, targets, scalings and kinds."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, r) in enumerate(LORA_RANKS.items()):
        save_adapter(model, folder / name, r, seed=seed)
    save_adapter(model, folder / "attention", 8, 10, target_modules=["q_proj", "v_proj"], use_rslora=True)
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"gate_proj": 3}, "layers_to_transform": [1]}
    save_adapter(model, folder / "patterns", 8, 11, **patterns)
    save_adapter(model, folder / "dora", 4, 12, use_dora=True)
    save_adapter(model, folder / "bias", 4, 13, lora_bias=True)
    save_adapter(model, folder / "head", 4, 14, modules_to_save=["lm_head"])
    for seed, name in enumerate(ACTIVATED):  # all by the same word
        save_adapter(model, folder / name, 8, 20 + seed, alora_invocation_tokens=byte_tokenizer().encode(INVOCATION))
    older = shutil.copytree(folder / ACTIVATED[0], folder / "older")  # the same, as the library before PEFT saves it
    edit_config(older, alora_invocation_tokens=None, invocation_string=INVOCATION)
    save_other_adapter(model, folder / "loha", LoHaConfig(r=4, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"))
    save_other_adapter(model, folder / "vera", VeraConfig(r=16, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"))
    factors = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    save_other_adapter(model, folder / "ia3", IA3Config(task_type="CAUSAL_LM", **factors))
    return folder


@pytest.fixture(scope="session")
def oracle(model: Path, adapters: Path) -> Oracle:
    return Oracle(model, adapters)


@pytest.fixture(scope="module")
def server(model: Path, adapters: Path) -> Iterator[Server]:
    """A server with the tiny model on one rank, and room for everything."""
    with Server(str(model), f"--adapters={adapters}", "--kv-blocks=512", "--threads=1") as running:
        yield running
        running.assert_nothing_is_held()
