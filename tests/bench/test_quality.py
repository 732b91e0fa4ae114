"""The script that measures quantization, with a tiny random model."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from bench.quality import FORMS, TEXT, app, measure, table
from loraplex_shard.checkpoint import open_checkpoint
from tests.shard.decoders import load_reference, save_checkpoint

WINDOWS = [torch.arange(40) % 96, torch.arange(20, 37)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=None,
    )
    return save_checkpoint(config, tmp_path / "model")


def test_every_form_is_compared_with_float32_on_the_same_tokens(directory: Path) -> None:
    results = measure(open_checkpoint(str(directory)), WINDOWS)
    assert list(results) == [form.name for form in FORMS]
    exact = results["float32"]
    assert (exact.divergence, exact.agreement) == (0.0, 1.0)
    assert all(result.divergence > 0 for name, result in results.items() if name != "float32")
    assert results["bfloat16"].divergence < results["int8"].divergence < results["int4"].divergence
    sizes = [results[name].weight_bytes / results["bfloat16"].weight_bytes for name in ("float32", "int8", "int4")]
    assert sizes[0] == pytest.approx(2, rel=0.01)  # norms are float32 in every form
    assert 0.5 < sizes[1] < 0.53
    assert sizes[2] < sizes[1]
    reference = load_reference(directory)
    with torch.inference_mode():
        losses = torch.cat(
            [
                torch.nn.functional.cross_entropy(reference(ids[None]).logits[0, :-1], ids[1:], reduction="none")
                for ids in WINDOWS
            ]
        )
    assert exact.perplexity == pytest.approx(float(losses.mean().exp()), rel=1e-3)
    assert table(results, 57).row_count == len(FORMS)


def test_an_error_for_a_model_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


def test_the_text_is_long_enough_for_the_default() -> None:
    assert len(TEXT.read_text()) > 10_000
