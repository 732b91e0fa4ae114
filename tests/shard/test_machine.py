"""What follows from the settings on this machine: device, dtype, context and cache size."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.ops.choose import choose_operations
from loraplex_shard.ops.cuda.operations import CudaOperations
from loraplex_shard.ops.reference import ReferenceOperations
from loraplex_shard.serving import machine
from loraplex_shard.settings import ModelSettings, SettingsError
from tests.shard.decoders import save_checkpoint

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_ranks_use_the_gpus_in_turn_unless_the_setting_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.pick_device("auto", 0) == machine.pick_device("cpu", 0) == CPU
    with pytest.raises(SettingsError, match=r"device: cuda is not available: torch .* is built for CPUs alone"):
        monkeypatch.setattr(torch.version, "cuda", None)
        machine.pick_device("cuda", 0)
    with pytest.raises(SettingsError, match=r"torch .* finds no GPU: .* older than 13\.0"):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        machine.pick_device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert [machine.pick_device("auto", rank).index for rank in range(3)] == [0, 1, 0]
    assert machine.pick_device("cuda", 1) == torch.device("cuda", 1)
    assert machine.pick_device("cpu", 0) == CPU


def test_a_gpu_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(SettingsError, match=r"device: .* 8\.0 or above"):
        machine.pick_device("auto", 0)


def test_float8_is_refused_where_the_device_does_not_multiply_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    checkpoint = open_checkpoint(str(save_checkpoint(config, tmp_path)))
    with pytest.raises(SettingsError, match=r"quantize: fp8 is for GPUs .* 8\.9 or above; set it to int8"):
        machine.pick_quantize("fp8", checkpoint, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(SettingsError, match="quantize: fp8"):
        machine.pick_quantize("fp8", checkpoint, CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert machine.pick_quantize("fp8", checkpoint, CUDA) == "fp8"


def test_a_float8_cache_is_refused_where_the_device_does_not_compute_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"kv_dtype: fp8 is for GPUs .* 8\.9 or above; set it to int8 here"):
        machine.pick_kv_dtype("fp8", torch.bfloat16, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert machine.pick_kv_dtype("fp8", torch.bfloat16, CUDA) == torch.float8_e4m3fn
    assert machine.pick_kv_dtype("auto", torch.bfloat16, CUDA) == torch.bfloat16


def test_the_device_determines_the_operations() -> None:
    assert isinstance(choose_operations(CUDA, torch.float16, None), CudaOperations)
    assert isinstance(choose_operations(CPU, torch.float16, None), ReferenceOperations)


def test_a_requested_dtype_is_used() -> None:
    assert machine.pick_dtype("float16", LlamaConfig(dtype="float32"), CPU) == torch.float16


def test_auto_is_the_checkpoints_dtype_on_a_gpu() -> None:
    assert machine.pick_dtype("auto", LlamaConfig(dtype="float16"), CUDA) == torch.float16
    assert machine.pick_dtype("auto", LlamaConfig(), CUDA) == torch.bfloat16


@pytest.mark.parametrize(
    ("stored", "computed"), [("float32", torch.float32), ("float16", torch.bfloat16), (None, torch.bfloat16)]
)
def test_auto_on_a_cpu_is_bfloat16_unless_the_checkpoint_has_float32(stored: str | None, computed: torch.dtype) -> None:
    assert machine.pick_dtype("auto", LlamaConfig(dtype=stored), CPU) == computed


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 1024),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 2048),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
    ],
)
def test_the_default_context_is_the_models(rope: dict[str, object], longest: int) -> None:
    config = LlamaConfig(max_position_embeddings=1024, rope_parameters=rope)
    assert machine.longest_context(ModelSettings(), config) == longest
    assert machine.longest_context(ModelSettings(max_model_len=longest), config) == longest
    with pytest.raises(SettingsError, match=f"max_model_len: {longest + 1} exceeds the model.s limit of {longest}"):
        machine.longest_context(ModelSettings(max_model_len=longest + 1), config)


def test_a_gpu_computes_more_tokens_per_step_unless_the_setting_says_otherwise() -> None:
    assert [machine.batch_tokens(ModelSettings(), device) for device in (CPU, CUDA)] == [256, 2048]
    assert machine.batch_tokens(ModelSettings(max_batch_tokens=32, max_sequences=8), CUDA) == 32
    assert machine.batch_tokens(ModelSettings(max_batch_tokens=32, max_sequences=300), CPU) == 300
