"""The engine's benchmark runs real steps of the real model."""

from collections.abc import Iterator
from itertools import count

import pytest
from transformers import Qwen3Config

from bench import paths
from bench.engine.stepping import Stepper, random_adapter
from bench.engine.timing import in_turns, median_of, seconds_per_byte
from bench.paths import VOCABULARY


def test_a_stepper_decodes_a_batch_with_and_without_adapters() -> None:
    stepper = Stepper("int4")
    adapters = [random_adapter(stepper.decoder.layouts, lora_rank, 0) for lora_rank in (8, 16)]
    assert stepper.seconds_per_decode(3, 40) > 0
    assert stepper.seconds_per_decode(3, 40, adapters) > 0
    assert stepper.seconds_per_decode(3, 40, adapters, 0) > 0
    assert stepper.weight_bytes < 0.36 * 269e6
    assert stepper.kv_bytes(3, 40) == 3 * 40 * 30 * 2 * 3 * 64 * 2


def test_a_stepper_computes_prompts_longer_than_a_chunk() -> None:
    stepper = Stepper("int4")
    stepper.prefill(2, 600)
    stepper.attention(2, 600)()


def test_works_are_measured_in_turns_after_a_round_that_does_not_count() -> None:
    called: list[str] = []

    def work(name: str, results: Iterator[int]) -> float:
        called.append(name)
        return next(results)

    a, b = count(10), count(0, -2)
    measured = in_turns({"a": lambda: work("a", a), "b": lambda: work("b", b)}, 3)
    assert called == ["a", "b"] * 4
    assert measured == {"a": [11, 12, 13], "b": [-2, -4, -6]}
    assert median_of(lambda a, b: a / b, measured["a"], measured["b"]) == 12 / -4
    assert seconds_per_byte()() > 0


def test_both_ways_to_compute_a_model_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    tiny = Qwen3Config(vocab_size=VOCABULARY, num_attention_heads=2, num_key_value_heads=2, **sizes)
    monkeypatch.setattr(paths, "MODELS", {"tiny": tiny})
    paths.paths(rounds=1)
    head, _, row = capsys.readouterr().out.splitlines()
    assert head.count(" | ") == row.count(" | ") == 4
    assert all(float(ratio) > 0 for ratio in row.strip("| ").split(" | ")[1:])
