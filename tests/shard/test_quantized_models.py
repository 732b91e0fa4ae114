"""Quantized decoders: their weights, and the CPU kernels compared with the reference."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.device.parallel import Group
from loraplex_shard.kernels.library import instruction_set
from loraplex_shard.ops.quantized import quantize
from loraplex_shard.settings import Quantize
from tests.shard.decoders import Sequences, load, save_checkpoint
from tests.shard.operations import BLOCK_SIZE, cpu_operations
from tests.shard.test_models import VARIANTS, random_tokens

pytestmark = pytest.mark.slow

BITS: dict[Quantize, int] = {"int8": 8, "int4": 4}
quantizations = pytest.mark.parametrize("quantization", BITS)


def config(tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        eos_token_id=None,
    )


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(config(request.param), tmp_path_factory.mktemp("checkpoint"))


@quantizations
def test_matrices_are_quantized_and_embedding_and_head_stay_at_8_bits(quantization: Quantize, directory: Path) -> None:
    decoder, checkpoint = load(directory, quantize=quantization), open_checkpoint(str(directory))
    bits = BITS[quantization]
    down = quantize(checkpoint.read("model.layers.0.mlp.down_proj.weight"), bits)
    assert torch.equal(decoder.layers[0].mlp.down.weight.matrix, down.dequantized())
    gate, up = (checkpoint.read(f"model.layers.0.mlp.{name}_proj.weight") for name in ("gate", "up"))
    fused = quantize(torch.cat((gate, up)), bits)
    assert torch.equal(decoder.layers[0].mlp.gate_up.weight.matrix, fused.dequantized())
    embedding = quantize(checkpoint.read("model.embed_tokens.weight"), 8).dequantized()
    assert torch.equal(decoder.embedding.weight.matrix, embedding)
    tied = checkpoint.config.tie_word_embeddings
    head = embedding if tied else quantize(checkpoint.read("lm_head.weight"), 8).dequantized()
    assert torch.equal(decoder.lm_head.weight.matrix, head)
    assert tied == (decoder.lm_head.weight.matrix.data_ptr() == decoder.embedding.weight.matrix.data_ptr())


@quantizations
def test_parameters_that_are_not_matrices_are_not_quantized(quantization: Quantize, directory: Path) -> None:
    exact, rounded = load(directory), load(directory, quantize=quantization)
    for (name, expected), (_, actual) in zip(exact.named_parameters(), rounded.named_parameters(), strict=True):
        assert torch.equal(actual, expected), name


@quantizations
def test_ranks_have_the_rows_of_the_whole_and_quantize_their_own_columns(
    quantization: Quantize, directory: Path
) -> None:
    whole = load(directory, quantize=quantization)
    ranks = [load(directory, group=Group(rank, 2), quantize=quantization) for rank in range(2)]
    up = [rank.layers[0].mlp.gate_up.weight.matrix[96:] for rank in ranks]
    assert torch.equal(torch.cat(up), whole.layers[0].mlp.gate_up.weight.matrix[192:])
    head = [rank.lm_head.weight.matrix for rank in ranks]
    assert torch.equal(torch.cat(head), whole.lm_head.weight.matrix)
    down = torch.cat([rank.layers[0].mlp.down.weight.matrix for rank in ranks], dim=1)
    torch.testing.assert_close(
        down, whole.layers[0].mlp.down.weight.matrix, rtol=0, atol=0.2 if "4" in quantization else 0.02
    )


@pytest.mark.parametrize("quantization", ["none", *BITS])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_compute_every_architecture_like_the_reference(
    variant: str, quantization: Quantize, tmp_path: Path
) -> None:
    directory = save_checkpoint(VARIANTS[variant], tmp_path)
    kernels = cpu_operations(instruction_set())
    ours, reference = (
        Sequences(load(directory, ops=ops, quantize=quantization), block_size=BLOCK_SIZE, num_blocks=12)
        for ops in (kernels, None)
    )
    for chunks in ({"a": random_tokens(19, 1), "b": [5]}, {"a": [7], "b": random_tokens(33, 2)}, {"b": [1], "a": [2]}):
        expected, actual = reference.step(chunks), ours.step(chunks)
        for name, logits in actual.items():
            _assert_close(logits, expected[name], quantization)


def _assert_close(actual: torch.Tensor, expected: torch.Tensor, quantization: Quantize) -> None:
    if quantization == "none":
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        return
    # An activation between two integers may be rounded to either if it differs in the last bit, as torch's sums do from
    # processor to processor. test_ops_cpu compares each kernel's results closely.
    assert float((actual - expected).norm() / expected.norm()) < 0.05
