"""What a rank's memory is divided into, on a CPU and, with stand-ins for what torch says, on a GPU."""

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.device.parallel import Group
from loraplex_shard.serving import memory
from loraplex_shard.settings import ModelSettings, SettingsError
from tests.shard.decoders import save_checkpoint

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
BLOCK_BYTES = 1 << 16


def test_the_number_of_blocks_can_be_set() -> None:
    assert memory.count_blocks(ModelSettings(kv_blocks=7), 1024, BLOCK_BYTES, CPU) == 7


def test_there_are_no_more_blocks_than_the_sequences_can_fill() -> None:
    settings = ModelSettings(max_sequences=2)
    assert memory.count_blocks(settings, 33, 1, CPU) == 2 * 3
    assert memory.count_blocks(settings.model_copy(update={"kv_blocks": 100}), 33, 1, CPU) == 2 * 3


def test_ranks_share_the_memory() -> None:
    alone = memory.count_blocks(ModelSettings(max_sequences=4096), 1 << 30, BLOCK_BYTES, CPU)
    shared = memory.count_blocks(ModelSettings(max_sequences=4096, tp=4), 1 << 30, BLOCK_BYTES, CPU)
    assert 0 < shared < alone / 2


def test_too_little_memory_for_one_block_is_an_error() -> None:
    with pytest.raises(SettingsError, match="kv_blocks: not one block"):
        memory.count_blocks(ModelSettings(), 1024, 1 << 60, CPU)


def test_more_blocks_than_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda cgroup: 10 * BLOCK_BYTES)
    assert memory.count_blocks(ModelSettings(kv_blocks=10), 1024, BLOCK_BYTES, CPU) == 10
    with pytest.raises(SettingsError, match=r"kv_blocks: 11 blocks take .* set kv_blocks to at most 10"):
        memory.count_blocks(ModelSettings(kv_blocks=11), 1024, BLOCK_BYTES, CPU)


def test_as_many_sequences_run_as_have_room_for_their_states(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda cgroup: 4 * 1000)
    assert memory.fit_sequences(ModelSettings(max_sequences=8), 0, CPU) == 8
    assert memory.fit_sequences(ModelSettings(max_sequences=8), 50, CPU) == 8
    assert memory.fit_sequences(ModelSettings(max_sequences=8), 100, CPU) == 5  # half of what the cache may have
    assert "so prefixes are not reused; at most 5 sequences run at once, not 8" in caplog.text
    with pytest.raises(SettingsError, match="it keeps 501 bytes for each sequence"):
        memory.fit_sequences(ModelSettings(max_sequences=8), 501, CPU)


def test_states_take_their_memory_from_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda cgroup: 4 * 1000)
    assert memory.count_blocks(ModelSettings(), 1024, 100, CPU) == 10
    assert memory.count_blocks(ModelSettings(), 1024, 100, CPU, states=500) == 5
    assert memory.count_blocks(ModelSettings(max_sequences=2), 1024, 0, CPU, states=500) == 2 * 64  # no attention


def container(folder: Path, limit: str, used: int, inactive: int = 0) -> None:
    """A container's files in cgroup version 2."""
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\nactive_file 7\n")


def test_the_container_limits_the_memory(tmp_path: Path) -> None:
    whole = memory.available_memory(tmp_path)
    container(tmp_path, "max", 4096)
    assert memory.available_memory(tmp_path) > whole / 2
    container(tmp_path, "12288", 4096)
    assert memory.available_memory(tmp_path) == 8192
    container(tmp_path, "12288", 4096, inactive=1024)
    assert memory.available_memory(tmp_path) == 9216
    container(tmp_path, "1024", 4096)
    assert memory.available_memory(tmp_path) == 0


def test_a_container_with_cgroup_version_1_limits_the_memory_too(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("12288\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("4096\n")
    (tmp_path / "memory" / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 96\n")
    assert memory.available_memory(tmp_path) == 8192 + 96


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_cache_adapters_and_steps_share_the_containers_free_memory(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    container(tmp_path, str(1 << 30), used=1 << 28)
    left = 3 << 28
    cache = 0
    if device == CPU:
        blocks = memory.count_blocks(ModelSettings(max_sequences=4096), 1 << 30, BLOCK_BYTES, CPU)
        cache = blocks * BLOCK_BYTES
        assert left / 5 < cache <= left / 4
    adapters = memory.share_for_adapters(ModelSettings(), cache, device)
    assert adapters == (left - cache) * 3 // 8
    assert memory.share_for_adapters(ModelSettings(), left if device == CPU else 0, device) in (0, left * 3 // 8)


def test_a_group_of_one_agrees_with_itself() -> None:
    assert memory.fewest(Group(0, 1), 42) == 42


def test_the_context_shrinks_to_the_cache_unless_it_was_requested() -> None:
    assert memory.fit_context(ModelSettings(), 1024, 4) == 4 * memory.BLOCK_SIZE
    assert memory.fit_context(ModelSettings(), 1024, 1024) == 1024
    with pytest.raises(SettingsError, match="max_model_len: the KV cache has 4 blocks"):
        memory.fit_context(ModelSettings(max_model_len=100), 100, 4)


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    checkpoint = open_checkpoint(str(save_checkpoint(config, tmp_path)))
    weights = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)
    monkeypatch.setattr(memory, "available_memory", lambda cgroup: 2 * weights)
    memory.check_room_for(checkpoint, torch.bfloat16, "none", 1, CPU)
    memory.check_room_for(checkpoint, torch.float32, "int8", 1, CPU)
    memory.check_room_for(checkpoint, torch.float32, "none", 2, CPU)
    with pytest.raises(
        SettingsError, match=rf"model: {weights:,} weights take at least .* set quantize to int8 or int4"
    ):
        memory.check_room_for(checkpoint, torch.float32, "none", 1, CPU)


class Gpu:
    """A GPU of `total` bytes in this process's view, with `used` bytes in use."""

    def __init__(self, total: int, used: int) -> None:
        self.total, self.used, self.reserved, self.peak = total, used, 0, 0

    def take(self, peak: int, kept: int) -> str:
        """What a step does: it reserves memory, and gives back all but some of it."""
        self.peak, self.reserved = self.reserved + peak, self.reserved + kept
        self.used += kept
        return "done"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu(total=1000 * BLOCK_BYTES, used=300 * BLOCK_BYTES)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu.total - gpu.used, gpu.total))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: gpu.reserved)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: gpu.peak)
    return gpu


def test_on_a_gpu_the_cache_gets_what_model_steps_and_adapters_leave_of_the_fraction(gpu: Gpu) -> None:
    settings = ModelSettings(max_sequences=4096)
    result, steps = memory.measure_steps(lambda: gpu.take(peak=60 * BLOCK_BYTES, kept=10 * BLOCK_BYTES), CUDA)
    assert (result, steps) == ("done", 50 * BLOCK_BYTES)
    adapters = memory.adapter_device_bytes(settings, CUDA)
    assert adapters == 100 * BLOCK_BYTES
    blocks = memory.count_blocks(settings, 1 << 30, BLOCK_BYTES, CUDA, kept=steps + adapters)
    assert blocks in (439, 440)  # 900 - 310 - 50 - 100
    half = settings.model_copy(update={"gpu_memory_fraction": 0.5})
    assert memory.count_blocks(half, 1 << 30, BLOCK_BYTES, CUDA, kept=steps + adapters) == blocks - 400
    assert memory.fit_sequences(settings, 290 * BLOCK_BYTES // 2, CUDA, kept=adapters) == 1


def test_the_log_says_what_a_gpus_memory_is_divided_into(gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    gpu.total, gpu.used = 80 << 30, 16 << 30
    divided = memory.divide(ModelSettings(), cache=44 << 30, steps=2 << 30, adapters=8 << 30, device=CUDA)
    assert (divided.total, divided.used, divided.cache) == (80 << 30, 16 << 30, 44 << 30)
    assert "of the GPU's 80.00 GiB, the KV cache gets 44.00 GiB, adapters in slots 8.00 GiB" in caplog.text


def test_what_does_not_fit_onto_a_gpu_is_named_with_the_settings_that_help(gpu: Gpu) -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    with pytest.raises(SettingsError, match=r"max_batch_tokens: the largest steps need more memory .* 9 GiB"):
        memory.measure_steps(too_large, CUDA)
    settings = ModelSettings(gpu_memory_fraction=0.3)
    with pytest.raises(SettingsError, match=r"gpu_memory_fraction: of the GPU's .* 0\.3 may be used; .* lower max_b"):
        memory.count_blocks(settings, 1 << 30, BLOCK_BYTES, CUDA, kept=0)
    with pytest.raises(SettingsError, match="set kv_blocks to at most 600"):
        fixed = ModelSettings(kv_blocks=650, max_sequences=4096)
        memory.count_blocks(fixed, 1 << 30, BLOCK_BYTES, CUDA, kept=100 * BLOCK_BYTES)


def test_adapters_on_a_cpu_have_no_limit_of_their_own_unless_one_is_set() -> None:
    assert memory.adapter_device_bytes(ModelSettings(), CPU) == 0
    assert memory.adapter_device_bytes(ModelSettings(adapter_memory_gib=0.5), CPU) == 1 << 29
    assert memory.measure_steps(lambda: 7, CPU) == (7, 0)
