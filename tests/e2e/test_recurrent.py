"""A model that keeps a state of each sequence, over real processes: Qwen 3.5's gated delta nets beside attention."""

import asyncio
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

from loraplex import AsyncClient, Client
from tests.e2e.processes import Server
from tests.e2e.test_equality import TOKENS, assert_equal_to_oracle
from tests.e2e.tiny import Oracle, byte_tokenizer, save_adapter

PROMPTS = ["The quick brown fox", "ABC " * 30, "ABC " * 29 + "abc"]
TARGETS = ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "q_proj", "o_proj", "down_proj"]


async def test_states_follow_their_sequences_through_chunks_several_answers_and_preemptions(tmp_path: Path) -> None:
    model, adapters, tokenizer = tmp_path / "model", tmp_path / "adapters", byte_tokenizer()
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    for seed, name in enumerate(["one", "other"]):
        save_adapter(model, adapters / name, 4 + seed, seed=seed, target_modules=TARGETS)
    flags = f"--adapters={adapters}", "--kv-blocks=16", "--max-batch-tokens=32", "--max-sequences=32", "--threads=1"
    questions = [(name, prompt) for prompt in PROMPTS for name in (None, "one", "other")]
    with Server(str(model), *flags) as server:
        with Client(server.address) as client:
            info = client.info()
            assert info.modeling_code == "transformers" and info.state_bytes > 0
        async with AsyncClient(server.address) as client:
            options = {"max_new_tokens": TOKENS, "ignore_eos": True, "logprobs": True}
            asked = (client.generate(prompt, adapter=name, n=2, temperature=0, **options) for name, prompt in questions)
            answers = await asyncio.gather(*asked)
        assert_equal_to_oracle(dict(zip(questions, answers, strict=True)), Oracle(model, adapters))
        for answer in answers:
            first, second = answer.sequences
            assert first.text == second.text and first.usage.cached_tokens == 0
        assert server.metric("loraplex_preemptions_total") > 0
        server.assert_nothing_is_held()
