"""Models that our own decoder does not support, in real processes: transformers' modeling code with our kernels."""

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5_MoeConfig,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from loraplex import AsyncClient, Client
from tests.e2e.processes import Server
from tests.e2e.test_equality import TOKENS, assert_equal_to_oracle
from tests.e2e.tiny import Oracle, byte_tokenizer, save_adapter

PROMPTS = ["The quick brown fox", "ABC " * 30]


def save(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "sizes", "targets", "tp"),
    [
        (GPT2Config, {"n_head": 4, "n_layer": 2, "n_embd": 64}, ["c_attn", "c_proj", "c_fc"], 1),
        (
            GPTNeoXConfig,
            {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96},
            ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
            2,
        ),
        (
            Ernie4_5_MoeConfig,
            {
                "hidden_size": 64,
                "intermediate_size": 96,
                "moe_intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "moe_num_experts": 4,
                "moe_k": 2,
            },
            ["q_proj", "k_proj", "v_proj", "o_proj"],
            2,
        ),
    ],
)
async def test_a_mixed_batch_of_any_class_equals_transformers_and_peft(
    kind: type[PreTrainedConfig], sizes: dict[str, int], targets: list[str], tp: int, tmp_path: Path
):
    tokenizer = byte_tokenizer()
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config = kind(vocab_size=len(tokenizer), max_position_embeddings=1024, initializer_range=0.3, **ends, **sizes)
    model, adapters = save(config, tokenizer, tmp_path / "model"), tmp_path / "adapters"
    for seed, name in enumerate(["one", "other"]):
        options = {"target_modules": targets, "fan_in_fan_out": kind is GPT2Config}
        if kind is Ernie4_5_MoeConfig:
            options |= {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
        save_adapter(model, adapters / name, 4 + seed, seed=seed, **options)
    flags = f"--adapters={adapters}", "--kv-blocks=512", "--threads=1", f"--tp={tp}"
    with Server(str(model), *flags) as server:
        with Client(server.address) as client:
            assert client.info().modeling_code == "transformers"
        questions = [(name, prompt) for prompt in PROMPTS for name in (None, "one", "other")]
        async with AsyncClient(server.address) as client:
            options = {"max_new_tokens": TOKENS, "ignore_eos": True, "logprobs": True}
            asked = (client.generate(prompt, adapter=name, **options) for name, prompt in questions)
            answers = dict(zip(questions, await asyncio.gather(*asked), strict=True))
        assert_equal_to_oracle(answers, Oracle(model, adapters))
        server.assert_nothing_is_held()
