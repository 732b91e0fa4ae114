"""Checkpoints with 4-bit and 8-bit floats load as the weights that they represent."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from loraplex_shard.checkpoint import CheckpointError, open_checkpoint
from loraplex_shard.checkpoint.quantized import stored
from loraplex_shard.checkpoint.quantized.bitsandbytes import Bitsandbytes
from loraplex_shard.checkpoint.quantized.floats import Float8, Mxfp4Experts
from loraplex_shard.checkpoint.quantized.stored import Layout, StoredMatrix
from loraplex_shard.checkpoint.safetensors.files import SafetensorsFiles
from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.parameters import ParameterForm
from tests.shard.decoders import Sequences, load, load_reference
from tests.shard.float_checkpoints import BITSANDBYTES, FORMATS, NF4, bitsandbytes_4_bits
from tests.shard.quantized_checkpoints import WEIGHTS, edit_config, edit_tensor, save_dequantized, save_stored

TOKENS = [5, 80, 3, 3, 41, 7, 66, 0, 95]
K = "model.layers.0.self_attn.k_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
Saved = tuple[Path, dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=FORMATS.values(), ids=FORMATS.keys())
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_stored(*request.param, tmp_path_factory.mktemp("stored"))


def find(layout: Layout, directory: Path, tensors: dict[str, torch.Tensor]) -> dict[str, StoredMatrix]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)
    return layout.find(SafetensorsFiles(directory, "model"))


def test_a_checkpoint_has_the_names_and_shapes_of_the_original_model(saved: Saved) -> None:
    checkpoint = open_checkpoint(str(saved[0]))
    assert saved[1].keys() < checkpoint.names
    assert not [name for name in checkpoint.names if not name.endswith((".weight", ".bias"))]
    assert {name: checkpoint.shape(name) for name in saved[1]} == {n: tuple(w.shape) for n, w in saved[1].items()}


@pytest.fixture(params=[1 << 23, 1000], ids=["whole", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "WEIGHTS_AT_A_TIME", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("rows", [slice(None), slice(3, 21), slice(7, 8)])
@pytest.mark.parametrize("columns", [slice(None), slice(64, 128), slice(5, 42)])
def test_every_slice_of_a_matrix_is_dequantized_exactly(saved: Saved, rows: slice, columns: slice) -> None:
    checkpoint = open_checkpoint(str(saved[0]))
    for name in (K, DOWN):
        torch.testing.assert_close(
            checkpoint.read(name, rows, columns), saved[1][name][rows, columns], rtol=1e-6, atol=1e-7
        )


def test_auto_computes_the_same_as_transformers_with_the_same_weights(saved: Saved, tmp_path: Path) -> None:
    directory, weights = saved
    plain = save_dequantized(weights, directory, tmp_path / "plain")
    expected = load_reference(plain)(torch.tensor([TOKENS])).logits[0]
    actual = Sequences(load(directory, quantize="none")).step({"a": TOKENS})["a"]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_int8_requantizes_it(saved: Saved) -> None:
    exact, rounded = (load(saved[0], quantize=quantize).layers[0].mlp.down.weight for quantize in ("none", "int8"))
    assert rounded.group is not None
    torch.testing.assert_close(rounded.matrix, exact.matrix, rtol=0, atol=float(exact.matrix.abs().max()) / 127)


def test_fp8_keeps_float8_with_scales_of_rows_and_rounds_the_rest(saved: Saved) -> None:
    exact, ours = (load(saved[0], quantize=form).layers[0].mlp.gate_up.weight for form in ("none", "fp8"))
    assert ours.float8
    torch.testing.assert_close(ours.matrix, exact.matrix, rtol=2**-4, atol=float(exact.matrix.abs().max()) * 2**-17)


@pytest.mark.parametrize("form", [name for name in FORMATS if "float8" in name or "by row" in name])
def test_fp8_computes_with_the_stored_float8(form: str, tmp_path: Path) -> None:
    directory, weights = save_stored(*FORMATS[form], tmp_path)
    decoder = load(directory, quantize="fp8")
    mlp = decoder.layers[0].mlp
    assert torch.equal(mlp.down.weight.matrix, weights[DOWN]) and mlp.down.weight.float8
    fused = torch.cat([weights[DOWN.replace("down", name)] for name in ("gate", "up")])
    assert torch.equal(mlp.gate_up.weight.matrix, fused)
    assert not decoder.lm_head.weight.float8 and not decoder.embedding.weight.float8
    checkpoint, gate_up = open_checkpoint(str(directory)), mlp.gate_up
    assert checkpoint.in_float8 and not checkpoint.prequantized
    for layer, keeps_float8 in ((gate_up, True), (gate_up, False), (decoder.embedding, True)):
        list(layer.load(checkpoint, ParameterForm(torch.float32, torch.device("cpu"), "auto", keeps_float8)))
        assert layer.weight.float8 == (keeps_float8 and layer is gate_up)
    assert torch.equal(gate_up.weight.matrix, fused)
    half = load(directory, group=Group(1, 2), quantize="fp8").layers[0].mlp.down.weight
    assert half.float8 and torch.equal(half.matrix, weights[DOWN][:, weights[DOWN].shape[1] // 2 :])


def test_the_ranks_of_a_group_hold_its_parts(saved: Saved) -> None:
    whole = load(saved[0], quantize="none").layers[0]
    ranks = [load(saved[0], group=Group(rank, 2), quantize="none").layers[0] for rank in range(2)]
    down = torch.cat([rank.mlp.down.weight.matrix for rank in ranks], dim=1)
    assert torch.equal(down, whole.mlp.down.weight.matrix)


def test_a_matrix_saved_by_bitsandbytes_is_read_exactly(tmp_path: Path) -> None:
    """The reference was recorded with bitsandbytes 0.50 from a random bfloat16 matrix of 2 by 64."""
    packed = (
        "3552754258566d8953a8a85ab6137547d78585787867e4c54976a9bd8a65c405"
        "735367e746345593574a2586853a358eacb3d43cda761423b5db88a5f67e1e89"
    )
    state = b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64]}'
    tensors = {
        "model.a.weight": torch.tensor(list(bytes.fromhex(packed)), dtype=torch.uint8)[:, None],
        "model.a.weight.absmax": torch.tensor([0.333984375, 0.255859375]),
        "model.a.weight.quant_map": torch.tensor(NF4),
        "model.a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    }
    for storage in (torch.uint8, torch.bfloat16):  # this is used by Unsloth and FSDP
        tensors["model.a.weight"] = tensors["model.a.weight"].flatten().view(storage)[:, None]
        weights = find(Bitsandbytes(), tmp_path, tensors)["model.a.weight"].read(slice(None), slice(None)).dequantized()
        assert weights.dtype == torch.bfloat16
        assert weights[0, :6].tolist() == [
            -0.1318359375,
            -0.061767578125,
            -0.061767578125,
            -0.17578125,
            0,
            -0.061767578125,
        ]
        assert weights[1, -5:].tolist() == [0.1845703125, -0.177734375, 0.1845703125, 0.0203857421875, 0.041259765625]


@pytest.mark.parametrize("scales", [(3, 2), (3, 5)])
def test_float8_blocks_equal_transformers(scales: tuple[int, int], tmp_path: Path) -> None:
    weights = torch.randn(96, 160 if scales[1] == 5 else 64).to(torch.float8_e4m3fn)
    factors = torch.rand(scales)
    expected = Fp8Dequantize(None)._dequantize_one(weights, factors, torch.float32)
    found = find(Float8((32, 32)), tmp_path, {"model.a.weight": weights, "model.a.weight_scale_inv": factors})
    torch.testing.assert_close(found["model.a.weight"].read(slice(None), slice(None)).dequantized(), expected)


def test_blocks_at_the_edge_may_be_smaller(tmp_path: Path) -> None:
    weights, factors = torch.randn(40, 50).to(torch.float8_e4m3fn), torch.rand(2, 2)
    found = find(Float8((32, 32)), tmp_path, {"model.a.weight": weights, "model.a.weight_scale_inv": factors})[
        "model.a.weight"
    ]
    spread = factors.repeat_interleave(32, 0).repeat_interleave(32, 1)[:40, :50]
    torch.testing.assert_close(
        found.read(slice(30, 40), slice(20, 50)).dequantized(), (weights.float() * spread)[30:, 20:]
    )


def test_float8_experts_have_separate_scales(tmp_path: Path) -> None:
    weights, factors = torch.randn(4, 64, 96).to(torch.float8_e4m3fn), torch.rand(4, 2, 3)
    found = find(Float8((32, 32)), tmp_path, {"model.experts.up": weights, "model.experts.up_scale_inv": factors})[
        "model.experts.up"
    ]
    expected = weights.float() * factors.repeat_interleave(32, 1).repeat_interleave(32, 2)
    torch.testing.assert_close(found.read(slice(1, 3), slice(10, 40)).dequantized(), expected[1:3, 10:40])


def test_gpt_oss_experts_equal_transformers(tmp_path: Path) -> None:
    blocks = torch.randint(0, 256, (4, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(120, 134, (4, 6, 3), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    found = find(Mxfp4Experts(), tmp_path, {"model.experts.up_blocks": blocks, "model.experts.up_scales": scales})
    experts = found["model.experts.up"]
    assert experts.shape == tuple(expected.shape) == (4, 96, 6)
    assert torch.equal(experts.read(slice(1, 3), slice(None)).dequantized(), expected[1:3])


def test_scales_of_activations_are_ignored(tmp_path: Path) -> None:
    directory, weights = save_stored(*FORMATS["float8, one scale"], tmp_path)
    for name in ("k_proj.input_scale", "k_proj.k_scale", "attn.v_scale", "kv_scale"):
        edit_tensor(directory, f"model.layers.0.self_attn.{name}", torch.ones(1))
    assert torch.equal(load(directory, quantize="none").layers[0].mlp.down.weight.matrix, weights[DOWN])


def test_modelopts_separate_configuration_file_is_read(tmp_path: Path) -> None:
    directory, weights = save_stored(*FORMATS["ModelOpt NVFP4"], tmp_path)
    edit_config(directory, quantization_config=None)
    (directory / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    torch.testing.assert_close(open_checkpoint(str(directory)).read(K), weights[K])


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("absmax", None, r"missing tensor model\.layers\.0\.self_attn\.k_proj\.weight\.absmax"),
        ("absmax", torch.ones(3), r"k_proj\.weight\.absmax is F32 \[3\], but .* 64 by 128 it must be .* \[128\]"),
        ("quant_state.bitsandbytes__nf4", torch.ones(3, dtype=torch.uint8), "is not a state of bitsandbytes"),
    ],
)
def test_an_incomplete_matrix_is_refused_with_the_tensors_name(
    suffix: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    directory, _ = save_stored(BITSANDBYTES, bitsandbytes_4_bits("nf4", nested=False), tmp_path)
    edit_tensor(directory, f"{K}.{suffix}", tensor)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(directory))


def test_float8_without_scales_is_refused(tmp_path: Path) -> None:
    directory, _ = save_stored(*FORMATS["float8, one scale"], tmp_path)
    edit_tensor(directory, K.replace("weight", "weight_scale"), None)
    with pytest.raises(CheckpointError, match=r"missing tensor .*k_proj\.weight_scale_inv or .*weight_scale"):
        open_checkpoint(str(directory))


def test_unquantized_floats_with_a_bitsandbytes_configuration_are_read_as_floats(tmp_path: Path) -> None:
    """Models that are loaded in 4 bits because of their configuration are published like this."""
    directory, weights = save_stored(BITSANDBYTES, lambda matrix: ({"weight": matrix}, matrix), tmp_path)
    checkpoint = open_checkpoint(str(directory))
    assert not checkpoint.prequantized
    assert torch.equal(checkpoint.read(K), weights[K])


def test_the_former_name_of_compressed_tensors_configuration_is_supported(tmp_path: Path) -> None:
    config, store = FORMATS["compressed-tensors float8, by row"]
    directory, weights = save_stored(config, store, tmp_path)
    edit_config(directory, quantization_config=None, compression_config=config)
    torch.testing.assert_close(open_checkpoint(str(directory)).read(K), weights[K])
