"""A rank's plan for the device's memory, and what is taken of it when everything is as large as it may be."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu.check import Check, DeviceName, Row
from bench.gpu.checkpoints import load, many_adapters, real, tiny
from bench.gpu.decode import MODEL, SIZES
from loraplex_shard.device.parallel import Group
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.serving import sizing
from loraplex_shard.serving.memory import BLOCK_SIZE
from loraplex_shard.settings import ModelSettings
from loraplex_shard.shapes.cache import KVCache
from loraplex_shard.stepping.runner import Runner, Slots

MIB = 1 << 20
SETTINGS: dict[DeviceName, ModelSettings] = {
    "cuda": ModelSettings(),
    "cpu": ModelSettings(kv_blocks=8, max_sequences=2, max_batch_tokens=16),
}
LORA_RANK = 64


def checks(device: DeviceName) -> Iterator[Check]:
    yield Check("a full rank's largest steps", partial(_compare, device), 120)


def _compare(device: DeviceName) -> list[Row]:
    where, settings, group = torch.device(device), SETTINGS[device], Group(0, 1)
    config, dtype = (real(MODEL), torch.bfloat16) if device == "cuda" else (tiny(MODEL), torch.float32)
    model = load(config, device, dtype, max_model_len=SIZES[device].max_model_len)
    grammars = GrammarCompiler(b"{}", model.vocab_size, end_token_ids=())

    def new_runner(cache: KVCache, slots: Slots, max_sequences: int, max_model_len: int) -> Runner:
        return Runner(model, cache, slots, group, max_sequences, max_model_len, where, grammars)

    longest, recorded = SIZES[device].max_model_len, model.ops.recorded_sizes if device == "cuda" else ()
    sizes = sizing.fit(settings, model, group, where, dtype, dtype, longest, new_runner, recorded)
    planned, cache = sizes.memory, sizes.num_blocks * model.cache_block_bytes(BLOCK_SIZE)
    if device == "cpu":
        return _rows({"cache": (planned.cache, cache)})
    template = many_adapters(model.layouts, LORA_RANK, 1, dtype, device)[0]
    adapters = [template.memory.clone() for _ in range(planned.adapters // template.size_bytes)]
    on_adapters = sum(memory.nbytes for memory in adapters)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = _taken()
    sizes.runner.warmup(sizes.max_batch_tokens, flat=True)
    peak, allowed = _taken(), round(settings.gpu_memory_fraction * planned.total)
    assert peak <= allowed, f"{peak:,} bytes of the GPU are taken, of which {allowed:,} may be"
    return _rows(
        {
            "cache": (planned.cache, cache),
            "adapters": (planned.adapters, on_adapters),
            "steps": (planned.steps, peak - before),
            "model, recorded passes, other processes": (planned.used, before - cache - on_adapters),
            "together": (allowed, peak),
        }
    )


def _rows(parts: dict[str, tuple[int, int]]) -> list[Row]:
    return [
        {"what": what, "planned, MiB": planned / MIB, "taken, MiB": taken / MIB}
        for what, (planned, taken) in parts.items()
    ]


def _taken() -> int:
    """Bytes of the GPU that are in use, or were since the peak was last reset."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return int(total - free + torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved())
