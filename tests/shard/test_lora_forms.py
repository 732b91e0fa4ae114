"""Adapters that were trained on a base in another form: its projections joined or divided, or with other names."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, Phi3Config

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.reading import read_adapter
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.shapes.batch import Segment
from tests.shard.decoders import Sequences, load, load_reference, save_checkpoint
from tests.shard.families import FAMILIES, SIZES
from tests.shard.lora_models import edit_config, read
from tests.shard.tiny_classes import tiny_config

TOKENS = [5, 80, 3, 3, 41, 7, 66, 0, 95, 12, 30]


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(
        Phi3Config(**SIZES, sliding_window=None, rms_norm_eps=1e-5), tmp_path_factory.mktemp("joined")
    )


@pytest.fixture(scope="module")
def divided(joined: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, with Mistral's names."""
    directory = save_checkpoint(
        MistralConfig(**SIZES, sliding_window=None, rms_norm_eps=1e-5), tmp_path_factory.mktemp("divided")
    )
    tensors = load_file(joined / "model.safetensors")
    for layer in range(SIZES["num_hidden_layers"]):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        qkv, gate_up = tensors.pop(f"{attention}.qkv_proj.weight"), tensors.pop(f"{mlp}.gate_up_proj.weight")
        for name, part in zip("qkv", qkv.split([48, 16, 16]), strict=True):
            tensors[f"{attention}.{name}_proj.weight"] = part.contiguous()
        for name, part in zip(("gate", "up"), gate_up.chunk(2), strict=True):
            tensors[f"{mlp}.{name}_proj.weight"] = part.contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def train(base: Path, directory: Path, targets: str | list[str], **options: object) -> torch.Tensor:
    """Saves an adapter, and returns the logits of TOKENS with it."""
    torch.manual_seed(1)
    options = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    config = LoraConfig(target_modules=targets, **options)
    model = get_peft_model(load_reference(base), config)
    model.save_pretrained(directory)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([TOKENS])).logits[0]
    return logits


def serve(decoder: Decoder, adapter: Path, architecture: str = "any") -> torch.Tensor:
    base = BaseModel(architecture, tensors=decoder.tensors, served=decoder.served, matrices=decoder.matrices)
    found = read_adapter(read(adapter), decoder.layouts, base, torch.float32)
    assert not found.warnings
    return Sequences(decoder).step({"a": TOKENS}, (Segment(0, len(TOKENS), found.weights),))["a"]


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], ["k_proj", "up_proj", "down_proj"]], ids=["all", "qv", "some"]
)
def test_an_adapter_of_divided_projections_is_served_on_joined_ones(
    targets: str | list[str], joined: Path, divided: Path, tmp_path: Path
) -> None:
    expected = train(divided, tmp_path, targets, alpha_pattern={"v_proj|k_proj": 9})
    torch.testing.assert_close(serve(load(joined), tmp_path), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ["qkv_proj"], ["gate_up_proj", "o_proj"]], ids=str)
def test_an_adapter_of_joined_projections_is_served_on_divided_ones(
    targets: str | list[str], joined: Path, divided: Path, tmp_path: Path
) -> None:
    expected = train(joined, tmp_path, targets)
    torch.testing.assert_close(serve(load(divided), tmp_path), expected, rtol=1e-4, atol=1e-4)


def test_layers_in_both_forms_are_refused_by_name(joined: Path, divided: Path, tmp_path: Path) -> None:
    train(divided, tmp_path, ["q_proj"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"
    save_file(tensors | {name: torch.zeros(3, 48)}, file)
    with pytest.raises(AdapterInvalidError, match=r"layers\.0\.self_attn\.q_proj"):
        serve(load(joined), tmp_path)


def test_what_is_more_than_two_matrices_is_refused_in_another_form(joined: Path, divided: Path, tmp_path: Path) -> None:
    train(divided, tmp_path / "dora", ["q_proj"], use_dora=True)
    with pytest.raises(AdapterInvalidError, match="use_dora"):
        serve(load(joined), tmp_path / "dora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(divided, tmp_path / "bias", ["q_proj"], lora_bias=True)
    with pytest.raises(AdapterInvalidError, match="qkv_proj"):
        serve(load(joined), tmp_path / "bias")


def test_glm_has_chatglms_names_as_well(tmp_path: Path) -> None:
    """As adapters of glm-4-9b-chat have them, which came with code of its own."""
    base = save_checkpoint(FAMILIES["glm"], tmp_path / "base")
    decoder = load(base)
    torch.manual_seed(2)
    shapes = {"query_key_value": (48, 80), "dense": (48, 48), "dense_h_to_4h": (48, 144), "dense_4h_to_h": (72, 48)}
    holders = {"query_key_value": "self_attention", "dense": "self_attention"}
    theirs: dict[str, torch.Tensor] = {}
    ours: dict[str, torch.Tensor] = {}
    for layer in range(3):
        for name, (inputs, outputs) in shapes.items():
            a, b = torch.randn(3, inputs) * 0.2, torch.randn(outputs, 3) * 0.2
            module = f"transformer.encoder.layers.{layer}.{holders.get(name, 'mlp')}.{name}"
            theirs |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            own = {"dense": "self_attn.o", "dense_h_to_4h": "mlp.gate_up", "dense_4h_to_h": "mlp.down"}
            parts = {own.get(name): b}
            if name == "query_key_value":
                parts = dict(zip(("self_attn.q", "self_attn.k", "self_attn.v"), b.split([48, 16, 16]), strict=True))
            for module, rows in parts.items():
                prefix = f"model.layers.{layer}.{module}_proj"
                ours |= {f"{prefix}.lora_A.weight": a.clone(), f"{prefix}.lora_B.weight": rows.contiguous()}
    saved = {"theirs": (theirs, [*shapes]), "ours": (ours, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj"])}
    saved["ours"][1].append("down_proj")
    for folder, (tensors, targets) in saved.items():
        (tmp_path / folder).mkdir()
        fields = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": targets, "task_type": "CAUSAL_LM"}
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(fields))
        named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        save_file(named, tmp_path / folder / "adapter_model.safetensors")
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        expected = PeftModel.from_pretrained(load_reference(base), tmp_path / "ours")(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(serve(decoder, tmp_path / "theirs", "GlmForCausalLM"), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterInvalidError, match="another base"):
        serve(decoder, tmp_path / "theirs")
    edit_config(tmp_path / "theirs", r=4)
    with pytest.raises(AdapterInvalidError, match="query_key_value"):
        serve(decoder, tmp_path / "theirs", "GlmForCausalLM")


def test_an_adapter_of_divided_projections_of_a_gated_delta_net(tmp_path: Path) -> None:
    """As trainers write it that have queries, keys and values apart."""
    config = tiny_config("qwen3_5_text")
    save_checkpoint(config, tmp_path / "base")
    model, torch_random, tensors = load_reference(tmp_path / "base"), torch.Generator().manual_seed(1), {}
    for name, module in model.named_modules():
        if name.endswith("in_proj_qkv"):
            for part, rows in zip("qkv", module.weight.data.split([32, 32, 64]), strict=True):
                a, b = torch.randn(3, 64, generator=torch_random), torch.randn(len(rows), 3, generator=torch_random)
                rows += 2 * (b @ a)
                own = f"base_model.model.{name.removesuffix('qkv')}{part}"
                tensors |= {f"{own}.lora_A.weight": a, f"{own}.lora_B.weight": b}
    LoraConfig(r=3, lora_alpha=6, target_modules=["in_proj_q", "in_proj_k", "in_proj_v"]).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(serve(load(tmp_path / "base"), tmp_path), expected, rtol=1e-3, atol=1e-3)
