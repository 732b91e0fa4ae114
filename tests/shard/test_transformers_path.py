"""Guarantees for models that run with transformers' modeling code, besides their results."""

import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPTNeoXConfig, Phi3Config, PreTrainedConfig, RwkvConfig

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.device.parallel import Group
from loraplex_shard.kernels.library import instruction_set
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.reading import read_adapter
from loraplex_shard.models import Model
from loraplex_shard.models.transformers.linear import LinearInPlace
from loraplex_shard.models.transformers.model import TransformersModel
from loraplex_shard.models.transformers.rotary import freeze_rotary
from loraplex_shard.models.transformers.windows import read_window
from loraplex_shard.settings import Quantize
from loraplex_shard.shapes.batch import Segment
from tests.shard.decoders import Sequences, adapter_for, load, load_reference, save_checkpoint
from tests.shard.lora_models import edit_tensors, read
from tests.shard.operations import cpu_operations
from tests.shard.thread_ranks import run_on_ranks

TOKENS = [5, 80, 3, 3, 41, 7, 66, 0, 95]
NEOX = GPTNeoXConfig(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, hidden_act="gelu"
)
GPT2 = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(NEOX, tmp_path_factory.mktemp("neox"))


@pytest.mark.parametrize("config", [NEOX, GPT2], ids=lambda config: config.model_type)
@pytest.mark.parametrize(("quantize", "tolerance"), [("int8", 0.1), ("int4", 0.9)])
def test_linear_layers_are_quantized_as_they_are_loaded(
    config: GPTNeoXConfig, quantize: str, tolerance: float, tmp_path: Path
) -> None:
    folder = save_checkpoint(config, tmp_path)
    with torch.inference_mode():
        expected = load_reference(folder)(input_ids=torch.tensor([TOKENS])).logits[0]
    rounded = Sequences(load(folder, quantize=quantize)).step({"a": TOKENS})["a"]
    error = float((rounded - expected).norm() / expected.norm())
    assert 0 < error < tolerance


def test_the_kernels_compute_the_same_as_the_reference(directory: Path) -> None:
    ours, reference = load(directory, ops=cpu_operations(instruction_set())), load(directory)
    adapter = adapter_for(ours.layouts)
    drivers = [Sequences(model, block_size=16) for model in (ours, reference)]
    for chunks in ({"a": TOKENS, "b": [3, 1]}, {"a": [4], "b": [5]}, {"b": [6], "a": [7]}):
        end = sum(map(len, chunks.values()))
        actual, expected = (driver.step(chunks, (Segment(end - 1, end, adapter),)) for driver in drivers)
        for name in chunks:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-3)


ENDS = [f"base_model.model.{name}.weight" for name in ("gpt_neox.embed_in", "lm_head")]


def kinds_of(model: Model) -> dict[str, dict[str, object]]:
    """Kinds of adapters that are more than LoRA of linear layers within the layers."""
    layers = [part.module for layout in model.layouts for part in layout.parts if part.module != model.head_name]
    ends = [model.embedding_name, model.head_name]
    return {
        "plain": {"target_modules": [*layers, model.head_name]},
        "dora": {"target_modules": [*layers, *ends], "use_dora": True},
        "embedding": {"target_modules": [layers[0], model.embedding_name]},
        "tokens": {"target_modules": layers, "trainable_token_indices": TOKENS[:3]},
        "saved": {"target_modules": layers, "modules_to_save": ends},
        "saved layer": {"target_modules": layers[:-1], "modules_to_save": layers[-1:]},
    }


def save_adapter(base: Path, directory: Path, **options: object) -> torch.Tensor:
    """Saves a random adapter, and returns PEFT's logits with it."""
    torch.manual_seed(len(directory.name))
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # PEFT's about transposed and tied matrices
        config = LoraConfig(r=3, init_lora_weights=False, task_type="CAUSAL_LM", **options)
        adapted = get_peft_model(load_reference(base), config)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name and "lora_B" not in name:
                parameter.mul_(1 + torch.rand_like(parameter))
        adapted.save_pretrained(directory)
        logits: torch.Tensor = adapted(torch.tensor([TOKENS])).logits[0]
    return logits


def base_of(model: Model) -> BaseModel:
    ends = {"embedding": model.embedding_name, "head": model.head_name, "vocab_size": model.vocab_size}
    return BaseModel("", tensors=model.tensors, served=model.served, matrices=model.matrices, **ends)


@pytest.mark.parametrize(
    ("config", "ranks"),
    [pytest.param(NEOX, 1, id="neox"), pytest.param(NEOX, 2, id="neox-2"), pytest.param(GPT2, 1, id="gpt2")],
)
def test_adapters_of_all_kinds_have_the_logits_of_peft_in_one_batch_with_the_base(
    config: PreTrainedConfig, ranks: int, tmp_path: Path
) -> None:
    folder = save_checkpoint(config, tmp_path / "base")
    kinds = kinds_of(load(folder))
    if config is GPT2:
        del kinds["saved layer"]  # its matrices are held transposed, and refused
    expected = {kind: save_adapter(folder, tmp_path / kind, **options) for kind, options in kinds.items()}
    with torch.inference_mode():
        expected["base"] = load_reference(folder)(torch.tensor([TOKENS])).logits[0]
    loading = Lock()

    def answer(group: Group) -> dict[str, torch.Tensor]:
        with loading, patch.object(TransformersModel, "check_positions"):  # in it, ranks wait for each other
            model = load(folder, group=group)
        segments = []
        for number, kind in enumerate(kinds):
            weights = read_adapter(read(tmp_path / kind), model.layouts, base_of(model), torch.float32).weights
            segments.append(Segment(number * len(TOKENS), (number + 1) * len(TOKENS), weights))
        return Sequences(model, num_blocks=64).step(dict.fromkeys(expected, TOKENS), tuple(segments))

    actual = run_on_ranks(ranks, answer)[0]
    for kind, logits in expected.items():
        torch.testing.assert_close(actual[kind], logits, rtol=1e-3, atol=1e-3)
        assert kind == "base" or (logits - expected["base"]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (
            lambda t: t.update({name: torch.zeros(97, 64) for name in ENDS}),
            "97 tokens, and the model 96",
        ),
        (
            lambda t: t.update({"base_model.model.gpt_neox.final_layer_norm.weight": torch.zeros(64)}),
            "differ from the mod",
        ),
    ],
)
def test_what_transformers_code_cannot_do_with_an_adapter_is_refused_by_name(
    spoil: Callable[[dict[str, torch.Tensor]], None], fault: str, directory: Path, tmp_path: Path
) -> None:
    model = load(directory)
    save_adapter(directory, tmp_path, target_modules=["dense_h_to_4h"])
    edit_tensors(tmp_path, spoil)
    with pytest.raises(AdapterInvalidError, match=fault):
        read_adapter(read(tmp_path), model.layouts, base_of(model), torch.float32)


def test_a_matrix_of_its_own_that_files_hold_transposed_is_refused_by_name(tmp_path: Path) -> None:
    model = load(folder := save_checkpoint(GPT2, tmp_path / "base"))
    save_adapter(folder, tmp_path / "adapter", target_modules=["c_fc"], modules_to_save=["0.attn.c_proj"])
    with pytest.raises(AdapterInvalidError, match=r"h\.0\.attn\.c_proj\.weight.*differ from the model's own"):
        read_adapter(read(tmp_path / "adapter"), model.layouts, base_of(model), torch.float32)


@pytest.mark.parametrize("config", [NEOX, GPT2], ids=lambda config: config.model_type)
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_dora_uses_the_lengths_of_the_matrices_as_they_are_served(
    config: PreTrainedConfig, quantize: Quantize, tmp_path: Path
) -> None:
    model = load(save_checkpoint(config, tmp_path), quantize=quantize)
    for name, module in model._model.named_modules():
        if isinstance(module, LinearInPlace):
            torch.testing.assert_close(model.matrices.read(name, slice(3, 9)), module.layer.weight.matrix[3:9].float())


def test_a_model_that_keeps_state_outside_of_transformers_cache_is_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint(RwkvConfig(vocab_size=10, hidden_size=8, num_hidden_layers=2), tmp_path)
    with pytest.raises(CheckpointError, match="RwkvForCausalLM is not served: it keeps state besides keys"):
        load(tmp_path)


def test_a_missing_tensor_of_transformers_model_is_named(directory: Path, tmp_path: Path) -> None:
    model = load_reference(directory)
    tensors = model.state_dict()
    del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    model.save_pretrained(tmp_path, state_dict=tensors)
    assert "missing tensor gpt_neox.layers.1.mlp.dense_h_to_4h.weight" in _refusal(tmp_path)


def test_windows_are_read_from_masks() -> None:
    assert read_window(lambda batch, head, query, key: key <= query, 100) is None
    assert read_window(lambda batch, head, query, key: (key <= query) & (key > query - 7), 100) == 7
    with pytest.raises(CheckpointError, match="neither causal nor a sliding window"):
        read_window(lambda batch, head, query, key: (key <= query) & (key // 16 == query // 16), 100)
    with pytest.raises(CheckpointError, match="neither causal nor a sliding window"):
        read_window(lambda batch, head, query, key: key >= 0, 100)


def test_longrope_uses_its_long_factors_if_sequences_may_be_long() -> None:
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 32,
    }
    config = Phi3Config(
        pad_token_id=0,
        original_max_position_embeddings=32,
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters=rope,
    )
    short, long = Phi3RotaryEmbedding(config), Phi3RotaryEmbedding(config)
    freeze_rotary(short, 32)
    freeze_rotary(long, 128)
    torch.testing.assert_close(short.inv_freq, 4 * long.inv_freq)
    x, positions = torch.zeros(1, 1, 16), torch.tensor([[100]])
    before = long.inv_freq.clone()
    long(x, torch.tensor([[3]]))
    short(x, positions)
    assert torch.equal(long.inv_freq, before) and not torch.equal(short.inv_freq, long.inv_freq)


def _refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        load(directory)
    assert open_checkpoint(str(directory)).architecture == "GPTNeoXForCausalLM"
    return refused.value.message
