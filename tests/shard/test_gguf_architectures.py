"""A GGUF file of each architecture gives the same model as transformers' before the conversion."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.checkpoint.gguf.kinds import KINDS
from loraplex_shard.checkpoint.safetensors.files import SafetensorsFiles
from tests.shard.decoders import Sequences, load
from tests.shard.gguf_conversion import CASES, Case, random_model, write

TOKENS = torch.tensor([[5, 80, 3, 3, 41, 7, 66, 0, 95, 12, 33, 8, 90, 2, 71, 1, 44, 20, 61, 9]])


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def model(case: Case) -> PreTrainedModel:
    return random_model(case)


@pytest.fixture(scope="module")
def path(case: Case, model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write(case, model, tmp_path_factory.mktemp("converted") / "model.gguf"))


def test_the_tensors_equal_those_that_transformers_saves(path: str, model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    saved, checkpoint = SafetensorsFiles(tmp_path, "model"), open_checkpoint(path)
    assert checkpoint.names == saved.names
    for name in saved.names:
        assert checkpoint.shape(name) == saved.shape(name)
        torch.testing.assert_close(checkpoint.read(name), saved.read(name), rtol=0, atol=1e-6)


def test_the_configuration_computes_the_same(path: str, model: PreTrainedModel) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.architecture == type(model).__name__
    read = AutoModelForCausalLM.from_config(checkpoint.config, dtype=torch.float32).eval()
    read.load_state_dict(model.state_dict())
    torch.testing.assert_close(read(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_a_slice_equals_the_slice_of_the_whole_tensor(path: str) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names:
        whole = checkpoint.read(name)
        assert tuple(whole.shape) == checkpoint.shape(name)
        if whole.ndim > 1:
            rows = slice(len(whole) // 2, None)
            assert torch.equal(checkpoint.read(name, rows, slice(4, 20)), whole[rows, 4:20])
        else:
            assert torch.equal(checkpoint.read(name, slice(3, 9)), whole[3:9])


@pytest.mark.parametrize(
    "name",
    [
        *("llama 3.1", "llama, linear", "qwen2, yarn", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "granite"),
        *("command-r", "cohere2", "starcoder2", "olmo2", "smollm3", "glm4", "seed_oss", "mixtral"),
        *("qwen2moe", "qwen3moe", "olmo3", "olmoe", "exaone4", "exaone4, no window", "ministral3"),
        *("granitemoe", "granitemoe, shared", "gpt-oss", "phi2", "nemotron", "stablelm", "stablelm, parallel", "arcee"),
        *("ernie4_5", "qwen2vl", "qwen3vl", "qwen3vlmoe"),
    ],
)
def test_the_file_has_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = random_model(CASES[name])
    decoder = load(write(CASES[name], model, tmp_path / "model.gguf"), quantize="none")
    actual = Sequences(decoder).step({"a": TOKENS[0].tolist()})["a"]
    torch.testing.assert_close(actual, model(TOKENS).logits[0], rtol=1e-3, atol=1e-3)


def test_every_architecture_is_tested() -> None:
    assert {case.architecture for case in CASES.values()} == KINDS.keys()
