"""What follows from the settings on this machine: device, dtype, context and cache size."""

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.device.parallel import Group
from loraplex_shard.ops.choose import choose_operations
from loraplex_shard.ops.cuda.operations import CudaOperations
from loraplex_shard.ops.reference import ReferenceOperations
from loraplex_shard.serving import machine
from loraplex_shard.settings import ModelSettings, SettingsError
from tests.shard.decoders import save_checkpoint

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
BLOCK_BYTES = 1 << 16


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


def test_the_number_of_blocks_can_be_set() -> None:
    assert machine.count_blocks(ModelSettings(kv_blocks=7), 1024, BLOCK_BYTES, CPU) == 7


def test_there_are_no_more_blocks_than_the_sequences_can_fill() -> None:
    settings = ModelSettings(max_sequences=2)
    assert machine.count_blocks(settings, 33, 1, CPU) == 2 * 3
    assert machine.count_blocks(settings.model_copy(update={"kv_blocks": 100}), 33, 1, CPU) == 2 * 3


def test_ranks_share_the_memory() -> None:
    alone = machine.count_blocks(ModelSettings(max_sequences=4096), 1 << 30, BLOCK_BYTES, CPU)
    shared = machine.count_blocks(ModelSettings(max_sequences=4096, tp=4), 1 << 30, BLOCK_BYTES, CPU)
    assert 0 < shared < alone / 2


def test_too_little_memory_for_one_block_is_an_error() -> None:
    with pytest.raises(SettingsError, match="kv_blocks: not one block"):
        machine.count_blocks(ModelSettings(), 1024, 1 << 60, CPU)


def test_more_blocks_than_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda cgroup: 10 * BLOCK_BYTES)
    assert machine.count_blocks(ModelSettings(kv_blocks=10), 1024, BLOCK_BYTES, CPU) == 10
    with pytest.raises(SettingsError, match=r"kv_blocks: 11 blocks take .* set kv_blocks to at most 10"):
        machine.count_blocks(ModelSettings(kv_blocks=11), 1024, BLOCK_BYTES, CPU)


def test_as_many_sequences_run_as_have_room_for_their_states(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda cgroup: 4 * 1000)
    assert machine.fit_sequences(ModelSettings(max_sequences=8), 0, CPU) == 8
    assert machine.fit_sequences(ModelSettings(max_sequences=8), 50, CPU) == 8
    assert machine.fit_sequences(ModelSettings(max_sequences=8), 100, CPU) == 5  # half of what the cache may have
    assert "so prefixes are not reused; at most 5 sequences run at once, not 8" in caplog.text
    with pytest.raises(SettingsError, match="it keeps 501 bytes for each sequence"):
        machine.fit_sequences(ModelSettings(max_sequences=8), 501, CPU)


def test_states_take_their_memory_from_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda cgroup: 4 * 1000)
    assert machine.count_blocks(ModelSettings(), 1024, 100, CPU) == 10
    assert machine.count_blocks(ModelSettings(), 1024, 100, CPU, states=500) == 5
    assert machine.count_blocks(ModelSettings(max_sequences=2), 1024, 0, CPU, states=500) == 2 * 64  # no attention


def container(folder: Path, limit: str, used: int, inactive: int = 0) -> None:
    """A container's files in cgroup version 2."""
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\nactive_file 7\n")


def test_the_container_limits_the_memory(tmp_path: Path) -> None:
    whole = machine.available_memory(tmp_path)
    container(tmp_path, "max", 4096)
    assert machine.available_memory(tmp_path) > whole / 2
    container(tmp_path, "12288", 4096)
    assert machine.available_memory(tmp_path) == 8192
    container(tmp_path, "12288", 4096, inactive=1024)
    assert machine.available_memory(tmp_path) == 9216
    container(tmp_path, "1024", 4096)
    assert machine.available_memory(tmp_path) == 0


def test_a_container_with_cgroup_version_1_limits_the_memory_too(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("12288\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("4096\n")
    (tmp_path / "memory" / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 96\n")
    assert machine.available_memory(tmp_path) == 8192 + 96


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_cache_adapters_and_steps_share_the_containers_free_memory(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    container(tmp_path, str(1 << 30), used=1 << 28)
    left = 3 << 28
    cache = 0
    if device == CPU:
        blocks = machine.count_blocks(ModelSettings(max_sequences=4096), 1 << 30, BLOCK_BYTES, CPU)
        cache = blocks * BLOCK_BYTES
        assert left / 5 < cache <= left / 4
    adapters = machine.share_for_adapters(ModelSettings(), cache, device)
    assert adapters == (left - cache) * 3 // 8
    assert machine.share_for_adapters(ModelSettings(), left if device == CPU else 0, device) in (0, left * 3 // 8)


def test_a_group_of_one_agrees_with_itself() -> None:
    assert machine.fewest(Group(0, 1), 42) == 42


def test_the_context_shrinks_to_the_cache_unless_it_was_requested() -> None:
    assert machine.fit_context(ModelSettings(), 1024, 4) == 4 * machine.BLOCK_SIZE
    assert machine.fit_context(ModelSettings(), 1024, 1024) == 1024
    with pytest.raises(SettingsError, match="max_model_len: the KV cache has 4 blocks"):
        machine.fit_context(ModelSettings(max_model_len=100), 100, 4)


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    checkpoint = open_checkpoint(str(save_checkpoint(config, tmp_path)))
    weights = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)
    monkeypatch.setattr(machine, "available_memory", lambda cgroup: 2 * weights)
    machine.check_room_for(checkpoint, torch.bfloat16, "none", 1, CPU)
    machine.check_room_for(checkpoint, torch.float32, "int8", 1, CPU)
    machine.check_room_for(checkpoint, torch.float32, "none", 2, CPU)
    with pytest.raises(
        SettingsError, match=rf"model: {weights:,} weights take at least .* set quantize to int8 or int4"
    ):
        machine.check_room_for(checkpoint, torch.float32, "none", 1, CPU)
