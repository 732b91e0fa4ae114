"""The decoder compared with transformers, on tiny random checkpoints of every architecture and variant."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from loraplex_shard.models.decoder import Decoder
from tests.shard.decoders import Sequences, load, load_reference, save_checkpoint
from tests.shard.families import FAMILIES, LONGROPE, MAX_MODEL_LEN, SIZES, VOCABULARY, rope


def llama(**fields: Any) -> LlamaConfig:
    return LlamaConfig(**SIZES | fields)


VARIANTS: dict[str, PreTrainedConfig] = FAMILIES | {
    "llama": llama(),
    "llama, tied": llama(tie_word_embeddings=True),
    "llama, biases": llama(attention_bias=True, mlp_bias=True),
    "llama, wide heads": llama(head_dim=12),
    "llama, one KV head per head": llama(num_key_value_heads=6),
    "llama, linear": llama(rope_parameters=rope("linear", factor=2.0)),
    "llama, dynamic": llama(rope_parameters=rope("dynamic", factor=3.0), max_position_embeddings=16),
    "llama, yarn": llama(rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama, yarn with its options": llama(
        rope_parameters=rope(
            "yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=16.0, beta_slow=2.0, truncate=False
        )
    ),
    "llama, longrope": llama(rope_parameters=rope("longrope", original_max_position_embeddings=16, **LONGROPE)),
    "llama, longrope within the original length": llama(
        rope_parameters=rope("longrope", original_max_position_embeddings=64, factor=2.0, **LONGROPE)
    ),
    "llama, llama3": llama(
        rope_parameters=rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        )
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None, head_dim=10),
    "mistral, sliding window": MistralConfig(**SIZES, sliding_window=7),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, some layers with a window": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=10, hidden_act="swish"),
    "qwen3, biases, tied, some layers with a window": Qwen3Config(
        **SIZES,
        head_dim=10,
        attention_bias=True,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
    ),
}


@dataclass(frozen=True)
class Pair:
    ours: Decoder
    theirs: PreTrainedModel

    def expected(self, tokens: list[int]) -> torch.Tensor:
        """transformers' logits [tokens, vocab].

        If RoPE depends on the length, transformers chooses it for a pass's last position. Ours is fixed: for dynamic as
        in transformers' decoding token by token, for longrope as for the longest sequence served.
        """
        rope = getattr(self.theirs.config, "rope_parameters", {})  # GPT-J has none
        if rope.get("rope_type") == "dynamic":
            return self._token_by_token(tokens)
        longest = tokens + [0] * (MAX_MODEL_LEN - len(tokens))  # later tokens do not change a token's logits
        with torch.inference_mode():
            return self.theirs(torch.tensor([longest])).logits[0, : len(tokens)]

    def _token_by_token(self, tokens: list[int]) -> torch.Tensor:
        cache, logits = None, []
        with torch.inference_mode():
            for token in tokens:
                out = self.theirs(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                logits.append(out.logits[0, 0])
        return torch.stack(logits)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = save_checkpoint(request.param, tmp_path_factory.mktemp("checkpoint"))
    return Pair(load(directory), load_reference(directory))


def random_tokens(length: int, seed: int) -> list[int]:
    random = Random(seed)
    return [random.randrange(VOCABULARY) for _ in range(length)]


def assert_equal_within_rounding(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_in_one_chunk_has_the_logits_of_transformers(pair: Pair) -> None:
    tokens = random_tokens(41, seed=1)
    assert_equal_within_rounding(Sequences(pair.ours).step({"a": tokens})["a"], pair.expected(tokens))


def test_uneven_chunks_have_the_logits_of_transformers(pair: Pair) -> None:
    tokens, driver = random_tokens(41, seed=2), Sequences(pair.ours)
    cuts = [0, 1, 6, 8, 9, 24, 37, 38, 41]
    chunks = [tokens[start:stop] for start, stop in pairwise(cuts)]
    actual = torch.cat([driver.step({"a": chunk})["a"] for chunk in chunks])
    assert_equal_within_rounding(actual, pair.expected(tokens))


def test_chunks_and_decodes_of_many_sequences_in_one_batch_are_independent(pair: Pair) -> None:
    driver, random = Sequences(pair.ours), Random(3)
    tokens = {name: random_tokens(length, seed=length) for name, length in (("a", 5), ("b", 23), ("c", 48), ("d", 33))}
    actual: dict[str, list[torch.Tensor]] = {name: [] for name in tokens}
    left = dict(tokens)
    while left:
        names = random.sample(sorted(left), random.randint(1, len(left)))
        chunks = {name: left[name][: random.choice([1, 1, 2, 7, 13])] for name in names}
        for name, logits in driver.step(chunks).items():
            actual[name].append(logits)
        left = {n: rest for n, t in left.items() if (rest := t[len(chunks.get(n, [])) :])}
    for name, logits in actual.items():
        assert_equal_within_rounding(torch.cat(logits), pair.expected(tokens[name]))


def test_greedy_tokens_equal_transformers(pair: Pair) -> None:
    prompt = random_tokens(12, seed=4)
    ours = Sequences(pair.ours).greedy(prompt, 16)
    logits = pair.expected(prompt + ours[:-1])[len(prompt) - 1 :]
    assert ours == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    directory = save_checkpoint(VARIANTS["qwen3"], tmp_path)
    tokens = random_tokens(30, seed=5)
    exact = Pair(load(directory), load_reference(directory)).expected(tokens)
    theirs = load_reference(directory, dtype)(torch.tensor([tokens])).logits[0].float()
    ours = Sequences(load(directory, dtype)).step({"a": tokens})["a"]
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().mean() < 1.25 * (theirs - exact).abs().mean()
