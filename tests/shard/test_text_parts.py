"""The text model of checkpoints that also read pictures, compared with transformers and PEFT, under all names that
they were saved with."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMultimodalLM,
    AyaVisionConfig,
    Cohere2VisionConfig,
    Gemma3Config,
    Glm4vConfig,
    GotOcr2Config,
    Idefics3Config,
    InternVLConfig,
    Lfm2VlConfig,
    LightOnOcrConfig,
    Llama4Config,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    Mistral3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SmolVLMConfig,
    VipLlavaConfig,
    VoxtralConfig,
)

from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.reading import read_adapter
from loraplex_shard.lora.sources.files import TENSORS
from loraplex_shard.shapes.batch import Segment
from tests.shard.decoders import Sequences, load
from tests.shard.families import MIXED, SIZES, rope
from tests.shard.lora_models import edit_config, read
from tests.shard.tiny_classes import LINEAR

TEXT = {key: value for key, value in SIZES.items() if not key.endswith("token_id")}
TOKENS = [5, 80, 3, 3, 41, 7, 66, 0, 90, 12, 30]
IDS = {"image_token_id": 95, "image_token_index": 95, "video_token_id": 94, "pad_token_id": None}
MROPE = {"rope_parameters": rope("default", mrope_section=[1, 1, 2])}
MISTRAL = TEXT | {"model_type": "mistral", "head_dim": 10, "sliding_window": None}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 4,
}
PIXTRAL = SIGLIP | {"model_type": "pixtral", "head_dim": 8}
QWEN = {
    "depth": 1,
    "embed_dim": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_heads": 1,
    "out_hidden_size": 48,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 4,
}
IDEFICS = SIGLIP | {"model_type": "idefics3_vision"}
INTERNVL = SIGLIP | {"model_type": "internvl_vision", "image_size": [8, 8], "patch_size": [4, 4]}
COHERE = TEXT | {"model_type": "cohere2", "logit_scale": 0.3, "sliding_window": 5, "layer_types": MIXED}
HYBRID = TEXT | LINEAR | {"head_dim": 8, "num_hidden_layers": 4} | MROPE
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
CONVOLUTIONS = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4}
MODELS: dict[str, PreTrainedConfig] = {
    "qwen3.5": Qwen3_5Config(text_config=HYBRID, vision_config=QWEN, vision_start_token_id=93, **IDS),
    "qwen3.5 moe": Qwen3_5MoeConfig(text_config=HYBRID | EXPERTS, vision_config=QWEN, vision_start_token_id=93, **IDS),
    "lfm2 vl": Lfm2VlConfig(
        text_config=TEXT | CONVOLUTIONS,
        vision_config=SIGLIP | {"model_type": "siglip2_vision_model", "num_patches": 4},
        image_token_id=95,
    ),
    "gemma3": Gemma3Config(
        text_config=TEXT | {"head_dim": 10, "sliding_window": 5, "sliding_window_pattern": 2},
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        **IDS,
    ),
    "qwen2 vl": Qwen2VLConfig(text_config=TEXT | MROPE, vision_config=QWEN | {"hidden_size": 48}, **IDS),
    "qwen2.5 vl": Qwen2_5_VLConfig(text_config=TEXT | MROPE, vision_config=QWEN, tie_word_embeddings=True, **IDS),
    "qwen3 vl": Qwen3VLConfig(
        text_config=TEXT | {"head_dim": 8} | MROPE, vision_config=QWEN, vision_start_token_id=93, **IDS
    ),
    "mistral3": Mistral3Config(
        text_config=TEXT | {"model_type": "mistral", "head_dim": 10, "sliding_window": None},
        vision_config=PIXTRAL,
        **IDS,
    ),
    "llava": LlavaConfig(text_config=TEXT | {"model_type": "llama"}, vision_config=SIGLIP, **IDS),
    "pixtral": LlavaConfig(
        text_config=TEXT | {"model_type": "mistral", "head_dim": 10, "sliding_window": None},
        vision_config=PIXTRAL,
        **IDS,
    ),
    "llava next": LlavaNextConfig(text_config=MISTRAL, vision_config=SIGLIP, **IDS),
    "llava next video": LlavaNextVideoConfig(text_config=TEXT | {"model_type": "llama"}, vision_config=SIGLIP, **IDS),
    "llava onevision": LlavaOnevisionConfig(text_config=TEXT | {"model_type": "qwen2"}, vision_config=SIGLIP, **IDS),
    "vipllava": VipLlavaConfig(
        text_config=TEXT | {"model_type": "llama"}, vision_config=SIGLIP, vision_feature_layer=[-1], **IDS
    ),
    "internvl": InternVLConfig(
        text_config=TEXT | {"model_type": "qwen2"}, vision_config=INTERNVL, tie_word_embeddings=False, **IDS
    ),
    "internvl 3.5": InternVLConfig(
        text_config=TEXT | {"model_type": "qwen3"}, vision_config=INTERNVL, tie_word_embeddings=False, **IDS
    ),
    "aya vision": AyaVisionConfig(text_config=COHERE, vision_config=SIGLIP, **IDS),
    "cohere2 vision": Cohere2VisionConfig(text_config=COHERE, vision_config=SIGLIP, **IDS),
    "got ocr 2": GotOcr2Config(
        text_config=TEXT | {"model_type": "qwen2"},
        vision_config={
            "hidden_size": 8,
            "output_channels": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 64,
            "mlp_dim": 8,
            "global_attn_indexes": [0],
        },
        **IDS,
    ),
    "lighton ocr": LightOnOcrConfig(
        text_config=TEXT | {"model_type": "qwen3", "head_dim": 8}, vision_config=PIXTRAL, **IDS
    ),
    "glm 4.1 v": Glm4vConfig(
        text_config=TEXT | {"rope_parameters": rope("default", mrope_section=[1, 1], partial_rotary_factor=0.5)},
        vision_config=QWEN | {"image_size": 8, "patch_size": 4},
        image_start_token_id=93,
        **IDS,
    ),
    "qwen3 vl, experts": Qwen3VLMoeConfig(
        text_config=TEXT
        | {"head_dim": 8, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        | MROPE,
        vision_config=QWEN,
        vision_start_token_id=93,
        **IDS,
    ),
    "voxtral": VoxtralConfig(
        text_config=TEXT | {"model_type": "llama"},
        audio_config={
            "hidden_size": 8,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_mel_bins": 4,
            "max_source_positions": 8,
        },
        audio_token_id=95,
    ),
    "idefics3": Idefics3Config(text_config=TEXT | {"model_type": "llama"}, vision_config=IDEFICS, **IDS),
    "smolvlm": SmolVLMConfig(
        text_config=TEXT | {"model_type": "llama"}, vision_config=IDEFICS | {"model_type": "smolvlm_vision"}, **IDS
    ),
}


def make(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([TOKENS])).logits[0]
    # Cohere's text models scale them, as vLLM does here; transformers' whole classes have forgotten to.
    return found * getattr(model.config.get_text_config(), "logit_scale", 1.0)


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_for_text_equal_transformers(name: str, tmp_path: Path) -> None:
    model = make(MODELS[name])
    model.save_pretrained(tmp_path)
    driver = Sequences(load(tmp_path))
    actual = torch.cat([driver.step({"a": chunk})["a"] for chunk in (TOKENS[:6], TOKENS[6:7], TOKENS[7:])])
    torch.testing.assert_close(actual, logits(model), rtol=1e-4, atol=1e-4)


CURRENT = re.compile(
    r"model\.(?:language_model|text_model)\.|language_model\.model\.|model\.(?=layers|norm|embed_tokens)"
)
FORMER = {"language_model.model": "language_model.lm_head", "model": "lm_head"}  # names of the backbone and the head


def renamed(tensors: dict[str, torch.Tensor], backbone: str, head: str) -> dict[str, torch.Tensor]:
    """Renames tensors for these names of the backbone and the head."""
    by_backbone = {CURRENT.sub(f"{backbone}.", name): tensor for name, tensor in tensors.items()}
    return {re.sub(r"(?:language_model\.)?lm_head", head, name): tensor for name, tensor in by_backbone.items()}


@pytest.mark.parametrize("backbone", FORMER)
@pytest.mark.parametrize("name", ["gemma3", "qwen2.5 vl", "qwen3 vl", "llava"])
def test_tensors_are_found_under_the_names_of_other_versions(name: str, backbone: str, tmp_path: Path) -> None:
    model = make(MODELS[name])
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    before = load_file(file)
    after = renamed(before, backbone, FORMER[backbone])
    save_file(after, file)
    assert f"{backbone}.norm.weight" in after
    torch.testing.assert_close(Sequences(load(tmp_path)).step({"a": TOKENS})["a"], logits(model), rtol=1e-4, atol=1e-4)


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS += ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "in_proj", "out_proj", "w1"]  # of hybrids


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "targets", [PROJECTIONS, rf".*(language|text).*({'|'.join(PROJECTIONS)})"], ids=["list", "pattern"]
)
def test_an_adapter_of_the_whole_model_is_found_under_any_of_its_names(name: str, targets: Any, tmp_path: Path) -> None:
    """The parts that read pictures may be adapted too; they do not affect text."""
    model = make(MODELS[name])
    model.save_pretrained(tmp_path / "base")
    decoder, plain = load(tmp_path / "base"), logits(model)
    options = {"r": 3, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, **options))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    assert (expected - plain).abs().max() > 0.01
    base = BaseModel("any", embedding=decoder.embedding_name, head=decoder.head_name, is_text_part=True)
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    for backbone, head in [("model.language_model", "lm_head"), *FORMER.items()]:
        save_file(renamed(tensors, backbone, head), tmp_path / "adapter" / TENSORS)
        adapter = read_adapter(read(tmp_path / "adapter"), decoder.layouts, base, torch.float32)
        sees_pictures = any(part in tensor for tensor in tensors for part in ("vision", "visual", "audio"))
        assert any("pictures" in warning for warning in adapter.warnings) == sees_pictures
        actual = Sequences(decoder).step({"a": TOKENS}, (Segment(0, len(TOKENS), adapter.weights),))["a"]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_pattern_with_former_module_names_still_matches(tmp_path: Path) -> None:
    model = make(MODELS["gemma3"])
    model.save_pretrained(tmp_path / "base")
    decoder = load(tmp_path / "base")
    now = r"model\.language_model\.layers\.\d\.self_attn\.q_proj"
    get_peft_model(model, LoraConfig(target_modules=now, init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    base = BaseModel("any", embedding=decoder.embedding_name, head=decoder.head_name, is_text_part=True)
    expected = read_adapter(read(tmp_path / "adapter"), decoder.layouts, base, torch.float32).weights
    edit_config(tmp_path / "adapter", target_modules=r"language_model\.model\.layers\.\d\.self_attn\.q_proj")
    actual = read_adapter(read(tmp_path / "adapter"), decoder.layouts, base, torch.float32).weights
    assert actual.layers.keys() == expected.layers.keys() == {f"layers.{layer}.qkv" for layer in range(3)}


def test_llama_4_runs_with_the_code_of_its_text_model_alone(tmp_path: Path) -> None:
    """Under the names that its files have: language_model.model.layers, vision_model and multi_modal_projector."""
    text = TEXT | {"intermediate_size_mlp": 72, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 28, "patch_size": 14, "pixel_shuffle_ratio": 0.5}
    sizes |= {"projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16}
    model = make(Llama4Config(text_config=text | {"pad_token_id": 0}, vision_config=vision | sizes))
    model.save_pretrained(tmp_path / "base")
    served = load(tmp_path / "base")
    assert served.modeling_code == "transformers"
    torch.testing.assert_close(Sequences(served).step({"a": TOKENS})["a"], logits(model), rtol=1e-4, atol=1e-4)
    options = {"r": 3, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj", "o_proj"], **options))
    adapted.save_pretrained(tmp_path / "adapter")
    base = BaseModel("any", embedding=served.embedding_name, head=served.head_name, is_text_part=True)
    adapter = read_adapter(read(tmp_path / "adapter"), served.layouts, base, torch.float32)
    assert any("pictures" in warning for warning in adapter.warnings)
    actual = Sequences(served).step({"a": TOKENS}, (Segment(0, len(TOKENS), adapter.weights),))["a"]
    torch.testing.assert_close(actual, logits(adapted), rtol=1e-4, atol=1e-4)


def test_experts_are_the_same_either_way_round_and_take_adapters_under_any_name(tmp_path: Path) -> None:
    """The first files of Qwen3-VL have experts' matrices as they are multiplied with."""
    model = make(MODELS["qwen3 vl, experts"])
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    turned = {name: t.transpose(1, 2).contiguous() for name, t in load_file(file).items() if ".mlp.experts." in name}
    served, plain = load(tmp_path / "base"), logits(model)
    save_file(load_file(file) | turned, file)
    for each in (served, load(tmp_path / "base")):
        torch.testing.assert_close(Sequences(each).step({"a": TOKENS})["a"], plain, rtol=1e-4, atol=1e-4)
    parameters = ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]
    options = {"r": 3, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], target_parameters=parameters, **options))
    adapted.save_pretrained(tmp_path / "adapter")
    expected, tensors = logits(adapted), load_file(tmp_path / "adapter" / TENSORS)
    base = BaseModel("any", embedding=served.embedding_name, head=served.head_name, is_text_part=True)
    for backbone, head in [(served.spec.names.backbone, "lm_head"), *FORMER.items()]:
        save_file(renamed(tensors, backbone, head), tmp_path / "adapter" / TENSORS)
        adapter = read_adapter(read(tmp_path / "adapter"), served.layouts, base, torch.float32)
        actual = Sequences(served).step({"a": TOKENS}, (Segment(0, len(TOKENS), adapter.weights),))["a"]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
