"""GPT-OSS's experts in MXFP4: the operations use exactly the checkpoint's values."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.device.parallel import Group
from loraplex_shard.kernels.library import instruction_set
from tests.shard.decoders import Sequences, load, save_checkpoint
from tests.shard.families import SIZES
from tests.shard.operations import BLOCK_SIZE, cpu_operations

TOKENS = [5, 80, 3, 3, 41, 7, 66, 0, 95, 12, 30]
EXPERTS, HIDDEN, UNITS = 3, 64, 96


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with experts as floats."""
    sizes = SIZES | {"hidden_size": HIDDEN, "intermediate_size": UNITS, "num_hidden_layers": 2}
    config = GptOssConfig(**sizes, head_dim=16, num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=7)
    return save_checkpoint(config, tmp_path_factory.mktemp("floats"))


@pytest.fixture(scope="module")
def directory(floats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, tensors = tmp_path_factory.mktemp("mxfp4"), load_file(floats / "model.safetensors")
    torch.manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        _, columns, rows = tensors[name].shape
        blocks = torch.randint(0, 256, (EXPERTS, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(119, 125, (EXPERTS, rows, columns // 32), dtype=torch.uint8)
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    stored = {name: tensor for name, tensor in tensors.items() if f"{name}_blocks" not in tensors}
    save_file(stored, directory / "model.safetensors")
    config = json.loads((floats / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(config))
    whole = {name: tensor for name, tensor in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    save_file(whole, floats / "model.safetensors")
    return directory


@pytest.mark.parametrize("size", [1, 2])
def test_experts_are_kept_as_they_are_stored(directory: Path, floats: Path, size: int) -> None:
    assert open_checkpoint(str(directory)).prequantized
    for rank in range(size):
        stored, exact = (
            load(each, group=Group(rank, size), quantize=form) for each, form in ((directory, "auto"), (floats, "none"))
        )
        for ours, theirs in zip(stored.layers, exact.layers, strict=True):
            for name in ("gate_up", "down"):
                pairs = zip(getattr(ours.mlp, name).experts, getattr(theirs.mlp, name).experts, strict=True)
                assert all(a.weight.matrix.equal(b.weight.matrix) for a, b in pairs)
                rounded = [expert.weight.group for expert in getattr(ours.mlp, name).experts]
                assert rounded == [32] * EXPERTS or (name == "down" and size > 1)  # the partition may divide a group


def test_kernels_compute_the_same_as_the_reference(directory: Path, floats: Path) -> None:
    stored, kernels, exact = (
        Sequences(decoder, BLOCK_SIZE)
        for decoder in (
            load(directory, quantize="auto"),
            load(directory, quantize="auto", ops=cpu_operations(instruction_set())),
            load(floats),
        )
    )
    for chunk in (TOKENS, [4], [9]):
        reference, ours, without = (each.step({"a": chunk})["a"] for each in (stored, kernels, exact))
        assert float((ours - reference).norm() / reference.norm()) < 0.02
        assert float((ours - without).norm() / without.norm()) < 0.1  # activations are rounded
