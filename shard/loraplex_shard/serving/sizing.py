"""Warms a model up on a cache that is thrown away, divides what is left of the rank's memory, and makes the cache."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from loraplex_protos.shard_pb2 import DeviceMemory
from loraplex_shard.device.parallel import Group
from loraplex_shard.lora.weights.transfer import Transfer
from loraplex_shard.models import Model
from loraplex_shard.serving import machine, memory
from loraplex_shard.serving.memory import BLOCK_SIZE
from loraplex_shard.settings import ModelSettings
from loraplex_shard.shapes.adapter import AdapterWeights
from loraplex_shard.shapes.cache import KVCache
from loraplex_shard.stepping.runner import Runner, Slots
from loraplex_shard.stepping.warmup import zero_adapters

logger = logging.getLogger(__name__)

BLOCKS = 8  # of the cache that is thrown away

NewRunner = Callable[[KVCache, Slots, int, int], Runner]  # with max_sequences and max_model_len


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a rank has room for, the same on all ranks of a group but for the memory."""

    runner: Runner  # of the cache; its slots hold no adapters of the store's yet
    num_blocks: int
    max_sequences: int
    max_model_len: int
    max_batch_tokens: int
    adapter_host_bytes: int
    adapter_device_bytes: int
    longest_step: float  # seconds
    memory: DeviceMemory


@dataclass(frozen=True, slots=True)
class FixedSlots:
    """Adapters that stay in their slots, from 1."""

    adapters: tuple[AdapterWeights, ...]

    def adapter_in(self, slot: int) -> AdapterWeights:
        return self.adapters[slot - 1]


def fit(
    settings: ModelSettings,
    model: Model,
    group: Group,
    device: torch.device,
    kv_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    max_model_len: int,
    new_runner: NewRunner,
    recorded_sizes: Sequence[int],
) -> Sizes:
    """All ranks of the group call this at once. `recorded_sizes`: see Operations. Raises SettingsError, naming the
    setting, if something does not fit."""
    on_device = memory.adapter_device_bytes(settings, device)
    most = memory.fewest(group, memory.fit_sequences(settings, model.state_bytes, device, on_device))
    settings, states = settings.model_copy(update={"max_sequences": most}), most * model.state_bytes
    tokens = machine.batch_tokens(settings, device)

    slots = FixedSlots(tuple(map(Transfer(device).to_device, zero_adapters(model.layouts, adapter_dtype))))

    def warm_up() -> tuple[float, int]:
        cache = model.new_cache(BLOCKS, BLOCK_SIZE, kv_dtype, most)
        for layer in cache.layers:  # contexts that were never computed are read
            for tensor in layer.tensors:
                tensor.zero_()
        flat = device.type == "cuda"
        return memory.measure_steps(lambda: new_runner(cache, slots, most, max_model_len).warmup(tokens, flat), device)

    logger.info("warming up ...")
    longest, steps = warm_up()  # which frees what it made
    block_bytes = model.cache_block_bytes(BLOCK_SIZE, kv_dtype)
    blocks = memory.count_blocks(settings, max_model_len, block_bytes, device, states, kept=steps + on_device)
    num_blocks = memory.fewest(group, blocks)
    cache_bytes = num_blocks * block_bytes + states
    on_host = memory.fewest(group, memory.share_for_adapters(settings, cache_bytes, device))
    divided = memory.divide(settings, cache_bytes, steps, on_device if device.type == "cuda" else on_host, device)
    max_model_len = memory.fit_context(settings, max_model_len, num_blocks)
    runner = new_runner(model.new_cache(num_blocks, BLOCK_SIZE, kv_dtype, most), slots, most, max_model_len)
    runner.record(recorded_sizes, tokens)
    return Sizes(
        runner,
        num_blocks,
        most,
        max_model_len,
        tokens,
        on_host,
        on_device,
        longest,
        divided,
    )
