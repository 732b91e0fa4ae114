"""Nothing that goes on beside the steps changes what they compute.

The same plans run twice: one after the other with all adapters in place, and two at a time while the slots that no plan
in flight names are emptied, written with NaN, and loaded again. Tokens and cache must be the same, bit by bit.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from random import Random

import torch

from bench.engine.stepping import Slots, random_adapter
from bench.gpu.check import Check, DeviceName, Row
from bench.gpu.checkpoints import load, tiny
from loraplex_protos.generation_pb2 import Sampling
from loraplex_protos.shard_pb2 import StepRequest
from loraplex_shard.device.parallel import Group
from loraplex_shard.lora.weights.transfer import Transfer
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.shapes.adapter import AdapterWeights
from loraplex_shard.stepping.runner import Runner
from tests.shard.planner import BLOCK_SIZE, MAX_MODEL_LEN, NUM_BLOCKS, Planner, random_tokens

# Plans, rows, and the longest prompt. Triton's interpreter is slow.
SIZES: dict[DeviceName, tuple[int, int, int]] = {"cuda": (300, 8, 60), "cpu": (3, 2, 6)}
LORA_RANKS = 8, 16, 3, 32  # of the adapters in slots 1 and above
IN_FLIGHT = 2
LONGEST = 100  # tokens of a sequence, so that all of them have room
SAMPLED = Sampling(temperature=1.2, top_p=0.9, seed=3)


def checks(device: DeviceName) -> Iterator[Check]:
    yield Check("adapters loaded underneath", partial(_replay, device), 90)


def _replay(device: DeviceName) -> Row:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = {"hidden_size": 512, "intermediate_size": 1024} if device == "cuda" else {}
    decoder = load(tiny("Llama 3 8B", **sizes), device, dtype, max_model_len=MAX_MODEL_LEN)
    held = [random_adapter(decoder.layouts, lora_rank, lora_rank, dtype) for lora_rank in LORA_RANKS]
    count, rows, longest = SIZES[device]
    plans = _plans(count, rows, longest)
    quiet, quiet_cache = Replay(decoder, held, rows).all(plans, in_flight=1, churning=False)
    busy, busy_cache = Replay(decoder, held, rows).all(plans, in_flight=IN_FLIGHT, churning=True)
    for number, (expected, actual) in enumerate(zip(quiet, busy, strict=True)):
        assert expected == actual, f"plan {number} of {len(plans)} gave {actual}, and {expected} before"
    for layer, (expected_layer, actual_layer) in enumerate(zip(quiet_cache, busy_cache, strict=True)):
        assert expected_layer.equal(actual_layer), f"the cache of layer {layer} differs"
    return {"plans": len(plans), "tokens": sum(map(len, quiet))}


class Replay:
    """A runner with adapters in slots 1 and above."""

    def __init__(self, decoder: Decoder, held: Sequence[AdapterWeights], rows: int) -> None:
        self._held, self._transfer, self._slots = held, Transfer(decoder.device), Slots()
        self._loaded = [self._transfer.to_device(adapter) for adapter in held]
        self._slots.adapters = self._loaded
        self._cache = decoder.new_cache(NUM_BLOCKS, BLOCK_SIZE)
        for layer in self._cache.layers:  # what no step writes is compared, too
            layer.keys.zero_()
            layer.values.zero_()
        self._runner = Runner(
            decoder,
            self._cache,
            self._slots,
            Group(0, 1),
            rows,
            MAX_MODEL_LEN,
            decoder.device,
            GrammarCompiler(b"{}", decoder.vocab_size, end_token_ids=()),
        )

    def all(
        self, plans: Sequence[StepRequest], in_flight: int, churning: bool
    ) -> tuple[list[list[int]], list[torch.Tensor]]:
        """Each plan's tokens, and the keys and values at the end."""
        begun = deque[tuple[StepRequest, object]]()
        tokens: list[list[int]] = []
        for plan in plans:
            begun.append((plan, self._runner.begin(plan)))
            if churning:
                self._reload({slot for each, _ in begun for slot in each.slots} | {0})
            while len(begun) >= in_flight:
                tokens.append(list(begun.popleft()[1].response().tokens))  # type: ignore[attr-defined]
        tokens += [list(pending.response().tokens) for _, pending in begun]  # type: ignore[attr-defined]
        return tokens, [
            tensor[:NUM_BLOCKS].clone() for layer in self._cache.layers for tensor in (layer.keys, layer.values)
        ]

    def _reload(self, used: set[int]) -> None:
        """Others than these slots are loaded again, after their memory has been another adapter's."""
        for slot, adapter in enumerate(self._held, start=1):
            if slot not in used:
                self._loaded[slot - 1] = adapter  # frees the one on the device
                spoilt = self._transfer.to_device(adapter.at(torch.full_like(adapter.memory, 255)))  # NaN
                del spoilt
                self._loaded[slot - 1] = self._transfer.to_device(adapter)


def _plans(count: int, rows: int, longest: int) -> list[StepRequest]:
    """Sequences that start, run in chunks and by single tokens, mixed, and end or are given up, at random."""
    planner, random, plans = Planner(), Random(0), []
    for number in range(count):
        for row in range(rows):
            if row not in planner.rows and random.random() < 0.5:
                prompt = random_tokens(random.randrange(1, longest), number * rows + row)
                sampling = SAMPLED if row % 2 else Sampling()
                planner.start(row, prompt, slot=random.randrange(len(LORA_RANKS) + 1), sampling=sampling)
        lengths = {}
        for row, state in planner.rows.items():
            left = state.known - state.computed
            if random.random() < 0.8:
                lengths[row] = left if left <= 4 else random.randrange(1, left + 1)
        plans.append(planner.plan(lengths))
        for row in list(planner.rows):
            if planner.rows[row].computed > LONGEST or random.random() < 0.05:
                planner.release(row)
    return plans
