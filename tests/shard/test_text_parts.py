"""The text model of checkpoints that read pictures as well, against transformers and PEFT, under all names that they
were saved with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Idefics3Config,
    LlavaConfig,
    Mistral3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from tests.shard.decoders import Sequences, load
from tests.shard.families import SIZES, rope

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
MODELS: dict[str, PreTrainedConfig] = {
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
    "idefics3": Idefics3Config(text_config=TEXT | {"model_type": "llama"}, vision_config=IDEFICS, **IDS),
    "smolvlm": SmolVLMConfig(
        text_config=TEXT | {"model_type": "llama"}, vision_config=IDEFICS | {"model_type": "smolvlm_vision"}, **IDS
    ),
}


def make(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([TOKENS])).logits[0]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_text_alone_has_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = make(MODELS[name])
    model.save_pretrained(tmp_path)
    driver = Sequences(load(tmp_path))
    actual = torch.cat([driver.step({"a": chunk})["a"] for chunk in (TOKENS[:6], TOKENS[6:7], TOKENS[7:])])
    torch.testing.assert_close(actual, logits(model), rtol=1e-4, atol=1e-4)
