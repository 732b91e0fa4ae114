"""A mixture of experts over two ranks: adapters of attention and of experts in one batch equal PEFT's answers."""

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from loraplex import AsyncClient
from tests.e2e.processes import Server
from tests.e2e.tiny import Oracle, byte_tokenizer, save_adapter

PROMPTS = ["The quick brown fox", "ABC " * 30]
TOKENS = 12


def save_mixture(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=72,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=8,
        num_experts=5,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


async def test_adapters_of_attention_and_of_experts_in_one_batch_equal_peft(tmp_path: Path):
    model, adapters = save_mixture(tmp_path / "model"), tmp_path / "adapters"
    save_adapter(model, adapters / "attention", 8, 1, target_modules=["q_proj", "o_proj"])
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    save_adapter(model, adapters / "experts", 4, 2, target_modules=["v_proj"], target_parameters=parameters)
    questions = [(name, prompt) for prompt in PROMPTS for name in (None, "attention", "experts")]
    with Server(str(model), f"--adapters={adapters}", "--kv-blocks=64", "--threads=1", "--tp=2") as server:
        async with AsyncClient(server.address) as client:
            asked = [
                client.generate(prompt, adapter=name, max_new_tokens=TOKENS, ignore_eos=True, logprobs=True)
                for name, prompt in questions
            ]
            answers = await asyncio.gather(*asked)
        server.assert_nothing_is_held()
    oracle = Oracle(model, adapters)
    for (name, prompt), answer in zip(questions, answers, strict=True):
        tokens, logprobs = oracle.generate(byte_tokenizer().encode(prompt), name, TOKENS)
        assert [token.id for token in answer.sequences[0].tokens] == tokens, (name, prompt)
        assert [token.logprob for token in answer.sequences[0].tokens] == pytest.approx(logprobs, abs=2e-3)
