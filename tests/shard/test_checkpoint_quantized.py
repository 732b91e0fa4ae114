"""Quantized checkpoints keep their integers; unsupported ones are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex_shard.checkpoint import CheckpointError, open_checkpoint
from loraplex_shard.device.parallel import Group
from loraplex_shard.kernels.library import instruction_set
from loraplex_shard.serving import machine
from tests.shard.decoders import Sequences, load, load_reference, save_checkpoint
from tests.shard.float_checkpoints import FORMATS
from tests.shard.operations import BLOCK_SIZE, cpu_operations
from tests.shard.quantized_checkpoints import (
    METHODS,
    WEIGHTS,
    Method,
    compressed_tensors,
    edit_config,
    edit_tensor,
    rounded,
    save_dequantized,
    save_quantized,
    save_stored,
)
from tests.shard.test_models import llama

TOKENS = [5, 80, 3, 3, 41, 7, 66, 0, 95]
K = "model.layers.0.self_attn.k_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
# Our operations only have symmetric 8-bit integers.
NO_SUCH_FORM = [METHODS[name] for name in ("GPTQ, 8 bits, asymmetric", "compressed-tensors W8A8, asymmetric")]
Saved = tuple[Path, dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=METHODS.values(), ids=METHODS.keys())
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


@pytest.fixture(scope="module")
def saved(method: Method, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_quantized(method, tmp_path_factory.mktemp("quantized"))


def rounding(weights: torch.Tensor, method: Method) -> float:
    """The error of offsets in float16: half of their last bit."""
    return 0.0 if method.symmetric else float(weights.abs().amax()) * 2 * 2**-11


def test_a_checkpoint_has_the_names_and_shapes_of_the_original_model(saved: Saved) -> None:
    checkpoint, plain = open_checkpoint(str(saved[0])), llama()
    assert checkpoint.prequantized
    assert {name for name in checkpoint.names if not name.endswith("bias")} > saved[1].keys()
    assert not [name for name in checkpoint.names if not name.endswith((".weight", ".bias"))]
    for name, weights in saved[1].items():
        assert checkpoint.shape(name) == tuple(weights.shape)
    assert checkpoint.shape("model.embed_tokens.weight")[0] == plain.vocab_size


@pytest.mark.parametrize("rows", [slice(None), slice(3, 21)])
@pytest.mark.parametrize("columns", [slice(None), slice(64, 128), slice(32, None), slice(5, 43)])
def test_every_slice_of_a_matrix_is_dequantized_exactly(saved: Saved, rows: slice, columns: slice) -> None:
    checkpoint = open_checkpoint(str(saved[0]))
    for name in (K, DOWN):
        torch.testing.assert_close(
            checkpoint.read(name, rows, columns), saved[1][name][rows, columns], rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("columns", [slice(None), slice(64, None), slice(64, 96)])
def test_the_integers_are_kept(saved: Saved, method: Method, columns: slice) -> None:
    checkpoint = open_checkpoint(str(saved[0]))
    for name, weights in saved[1].items():
        matrix = checkpoint.read_quantized(name, slice(8, 24), columns)
        if method in NO_SUCH_FORM:
            assert matrix is None
            continue
        assert matrix is not None
        assert (matrix.bits, matrix.group) == (4 if method.bits <= 4 else 8, 32 if method.group == 32 else 64)
        expected = weights[8:24, columns]
        difference = (matrix.dequantized() - expected).abs().amax()
        assert float(difference) <= rounding(expected, method) + 1e-6


def test_a_partition_through_a_group_uses_the_dtype(saved: Saved, method: Method) -> None:
    kept = method.group == -1 and method not in NO_SUCH_FORM
    assert (open_checkpoint(str(saved[0])).read_quantized(DOWN, columns=slice(8, 136)) is not None) == kept


def test_none_computes_the_same_as_transformers_with_the_same_weights(saved: Saved, tmp_path: Path) -> None:
    directory, weights = saved
    plain = save_dequantized(weights, directory, tmp_path / "plain")
    expected = load_reference(plain)(torch.tensor([TOKENS])).logits[0]
    actual = Sequences(load(directory, quantize="none")).step({"a": TOKENS})["a"]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_auto_differs_from_none_only_by_the_rounding_of_activations(saved: Saved) -> None:
    expected = Sequences(load(saved[0], quantize="none")).step({"a": TOKENS})["a"]
    kernels = cpu_operations(instruction_set())
    decoder = load(saved[0], quantize="auto", ops=kernels)
    actual = Sequences(decoder, block_size=BLOCK_SIZE, num_blocks=4).step({"a": TOKENS})["a"]
    assert float((actual - expected).norm() / expected.norm()) < 0.03


def test_auto_keeps_the_integers_of_layers_and_uses_the_dtype_for_the_rest(saved: Saved, method: Method) -> None:
    decoder, exact = load(saved[0], quantize="auto"), load(saved[0], quantize="none")
    layer, exact_layer = decoder.layers[0], exact.layers[0]
    kept = method not in NO_SUCH_FORM
    for name in ("gate_up", "down"):
        ours, theirs = getattr(layer.mlp, name).weight, getattr(exact_layer.mlp, name).weight
        assert (ours.group is not None) == kept
        torch.testing.assert_close(ours.matrix, theirs.matrix, rtol=0, atol=rounding(theirs.matrix, method) + 1e-6)
    assert decoder.embedding.weight.group is decoder.lm_head.weight.group is None


def test_the_ranks_of_a_group_hold_its_parts(saved: Saved, method: Method) -> None:
    whole = load(saved[0], quantize="auto").layers[0]
    ranks = [load(saved[0], group=Group(rank, 2), quantize="auto").layers[0] for rank in range(2)]
    down = torch.cat([rank.mlp.down.weight.matrix for rank in ranks], dim=1)
    o = torch.cat([rank.attention.o.weight.matrix for rank in ranks], dim=1)
    torch.testing.assert_close(down, whole.mlp.down.weight.matrix, rtol=0, atol=1e-6)
    # A group of 128 is divided into halves, each with its scale.
    torch.testing.assert_close(o, whole.attention.o.weight.matrix, rtol=0, atol=1e-6)


def test_auto_does_not_quantize_other_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, _ = save_quantized(METHODS["AWQ, 64"], tmp_path / "quantized")
    plain = save_checkpoint(llama(), tmp_path / "plain")
    settings = {str(quantized): "auto", str(plain): "none", "": "none"}
    assert {
        path: machine.pick_quantize("auto", open_checkpoint(path), torch.device("cpu")) for path in settings
    } == settings
    in_float8 = open_checkpoint(str(save_stored(*FORMATS["FBGEMM, by row"], tmp_path / "float8")[0]))
    assert machine.pick_quantize("auto", in_float8, torch.device("cpu")) == "none"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert machine.pick_quantize("auto", in_float8, torch.device("cuda")) == "auto"
    assert machine.pick_quantize("int4", open_checkpoint(str(plain)), torch.device("cpu")) == "int4"


def edit(fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return fields | changes


GPTQ, AWQ = METHODS["GPTQ, asymmetric, 32"].config, METHODS["AWQ, 64"].config
PACKED = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "aqlm"}, "quant_method 'aqlm' is not served, only 'gptq' or 'awq' or"),
        ({}, "quant_method None"),
        (GPTQ | {"bits": 5}, "bits 5 is not served, only 2 or 3 or 4 or 8"),
        (GPTQ | {"bits": "four"}, "bits 'four'"),
        (GPTQ | {"bits": [4]}, r"bits \[4\]"),
        (GPTQ | {"group_size": 0}, "group_size 0 is neither positive nor -1"),
        (GPTQ | {"group_size": None}, "group_size None"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format True"),
        (AWQ | {"bits": 8}, "bits 8 is not served, only 4"),
        (AWQ | {"version": "gemv"}, "version 'gemv'"),
        (AWQ | {"zero_point": False}, "zero_point False"),
        (GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:exllamav2"}, "packing_format"),
        (compressed_tensors("marlin-24", num_bits=4), "format 'marlin-24'"),
        (
            compressed_tensors("pack-quantized", **PACKED) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "format 'sparse-24-bitmask'",
        ),
        (
            compressed_tensors("pack-quantized", **PACKED) | {"transform_config": {"config_groups": {"u": {}}}},
            "transform_config",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"\[128\] is not a block's rows and columns"),
    ],
)
def test_unsupported_quantization_is_refused_by_field(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = save_checkpoint(llama(), tmp_path / "model")
    edit_config(directory, quantization_config=config)
    with pytest.raises(CheckpointError, match=rf"model: config\.json: quantization_config: {message}"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("qzeros", None, r"missing tensor model\.layers\.0\.mlp\.up_proj\.qzeros"),
        (
            "scales",
            torch.ones(4, 8),
            r"up_proj\.scales is F32 \[4, 8\], but .* 256 by 128 .* BF16 or F16 or F32 \[4, 256\]",
        ),
        ("qzeros", torch.ones(4, 32), r"up_proj\.qzeros is F32 \[4, 32\], but .* it must be I32 \[4, 32\]"),
        ("qweight", torch.ones(4, dtype=torch.int32), r"up_proj\.qweight has shape \[4\], but it must be a matrix"),
        ("bias", torch.ones(256), r"has no tensor model\.layers\.0\.mlp\.up_proj\.bias"),
    ],
)
def test_an_incomplete_matrix_is_refused_with_the_tensors_name(
    suffix: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    directory, _ = save_quantized(METHODS["GPTQ, asymmetric, 32"], tmp_path)
    edit_tensor(directory, f"model.layers.0.mlp.up_proj.{suffix}", tensor)
    with pytest.raises(CheckpointError, match=message):
        load(directory, quantize="auto")


@pytest.mark.parametrize(
    ("name", "suffix"), [("GPTQ, asymmetric, 32", "g_idx"), ("compressed-tensors W4A16, 32", "weight_g_idx")]
)
def test_columns_may_belong_to_any_group(name: str, suffix: str, tmp_path: Path) -> None:
    method = METHODS[name]

    def store(matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        order = torch.randperm(matrix.shape[1]) // 32
        of = rounded(matrix, method)
        weights = of.scales.float()[:, order] * (of.values - of.zeros[:, order])
        return method.store(of) | {suffix: order.int()}, weights

    directory, weights = save_stored(method.config | {"desc_act": True}, store, tmp_path)
    checkpoint = open_checkpoint(str(directory))
    assert checkpoint.read_quantized(DOWN) is None
    for part in (slice(None), slice(70, 200)):
        torch.testing.assert_close(checkpoint.read(DOWN, columns=part), weights[DOWN][:, part], rtol=1e-6, atol=0)


def test_a_matrix_with_scales_beyond_float16_uses_the_dtype(tmp_path: Path) -> None:
    directory, weights = save_quantized(METHODS["compressed-tensors W8A8"], tmp_path)
    scales = torch.full((len(weights[K]), 1), 1e-9)
    edit_tensor(directory, K.replace("weight", "weight_scale"), scales)
    checkpoint = open_checkpoint(str(directory))
    assert checkpoint.read_quantized(K) is None
    assert checkpoint.read_quantized(DOWN) is not None
    assert float(checkpoint.read(K).abs().amax()) > 1e-8


@pytest.mark.parametrize("name", ["GPTQ, asymmetric, 32", "AWQ, 64", "compressed-tensors W8A8"])
def test_a_quantized_head_is_used_even_if_the_configuration_says_tied(name: str, tmp_path: Path) -> None:
    directory, _ = save_quantized(METHODS[name], tmp_path)
    tensors = load_file(directory / WEIGHTS)
    integers = rounded(tensors.pop("lm_head.weight").float(), METHODS[name])
    stored = {f"lm_head.{suffix}": tensor.contiguous() for suffix, tensor in METHODS[name].store(integers).items()}
    save_file(tensors | stored, directory / WEIGHTS)
    edit_config(directory, tie_word_embeddings=True)
    decoder = load(directory, quantize="none")
    assert torch.equal(decoder.lm_head.weight.matrix, integers.weights)
    assert not torch.equal(decoder.embedding.weight.matrix, decoder.lm_head.weight.matrix)
