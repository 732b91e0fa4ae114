"""A recorded pass computes what the calls would: for every bucket of tokens, with and without adapters, while adapters
are loaded again."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.engine.stepping import random_adapter
from bench.gpu.check import Check, DeviceName, Row
from bench.gpu.checkpoints import load, tiny
from bench.gpu.races import LORA_RANKS, Replay
from loraplex_protos.shard_pb2 import StepRequest
from loraplex_shard.ops.base import Outputs
from loraplex_shard.ops.cuda.forms import BUCKETS
from loraplex_shard.ops.cuda.graphs import GraphRecorder, Record
from loraplex_shard.ops.cuda.operations import CudaOperations
from tests.shard.planner import MAX_MODEL_LEN, Planner, random_tokens

ROWS = 8
LARGEST: dict[DeviceName, int] = {"cuda": 512, "cpu": 1}  # bucket


def checks(device: DeviceName) -> Iterator[Check]:
    yield Check("every bucket, eager and recorded", partial(_compare, device), 90)


def _compare(device: DeviceName) -> Row:
    plans = 2 * _plans(LARGEST[device])  # a form's first step is computed, and recorded after that
    began, before = time.monotonic(), _reserved(device)
    eager, eager_cache = _replayed(device, plans, _computed)
    between = time.monotonic()
    recorded, recorded_cache = _replayed(device, plans, GraphRecorder() if device == "cuda" else _computed)
    for number, (expected, actual) in enumerate(zip(eager, recorded, strict=True)):
        assert expected == actual, f"plan {number} of {len(plans)} gives {actual} recorded, and {expected} without"
    for expected_layer, actual_layer in zip(eager_cache, recorded_cache, strict=True):
        assert expected_layer.equal(actual_layer), "what is written to the cache differs"
    return {
        "plans": len(plans),
        "eager, s": between - began,
        "recorded, s": time.monotonic() - between,
        "more memory, MiB": (_reserved(device) - before) / 2**20,
    }


def _replayed(
    device: DeviceName, plans: list[StepRequest], record: Record
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Both in the recorded passes' shapes, for which cuBLAS chooses the same kernels."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = {"hidden_size": 512, "intermediate_size": 1024} if device == "cuda" else {}
    ops = CudaOperations(torch.device(device), record)
    decoder = load(tiny("Llama 3 8B", **sizes), device, dtype, max_model_len=MAX_MODEL_LEN, ops=ops)
    held = [random_adapter(decoder.layouts, lora_rank, lora_rank, dtype) for lora_rank in LORA_RANKS]
    return Replay(decoder, held, ROWS).all(plans, in_flight=1, churning=True)


def _computed(compute: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
    """Records nothing, and computes anew."""
    result = compute()

    def again() -> None:
        for old, new in zip(result.tensors, compute().tensors, strict=True):
            old.copy_(new)

    return result, again


def _plans(largest: int) -> list[StepRequest]:
    """For each bucket: prompts that fill it, or all but one place of it, and a token more of each; then the same with
    adapters beside the base."""
    planner, plans = Planner(), list[StepRequest]()
    for bucket in (bucket for bucket in BUCKETS if bucket <= largest):
        for slots in (1, len(LORA_RANKS) + 1):
            for tokens in {bucket, max(1, bucket - 1)}:
                rows = min(ROWS, tokens)
                lengths = {row: tokens // rows + (row < tokens % rows) for row in range(rows)}
                for row, length in lengths.items():
                    planner.start(row, random_tokens(length, bucket + row), slot=row % slots)
                plans += [planner.plan(lengths), planner.plan(dict.fromkeys(lengths, 1))]
                for row in lengths:
                    planner.release(row)
    return plans


def _reserved(device: DeviceName) -> int:
    return torch.cuda.memory_reserved() if device == "cuda" else 0
