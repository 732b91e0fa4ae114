"""The threads of the CPU kernels: results equal those of one thread, for all callers and any number of calls."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from loraplex_shard.kernels.library import instruction_set
from loraplex_shard.ops.base import Norm
from loraplex_shard.ops.cpu.operations import CpuOperations
from loraplex_shard.ops.quantized import quantize
from loraplex_shard.shapes.heads import Heads
from tests.shard.operations import cpu_operations, filled_cache, paged_batch, random

pytestmark = pytest.mark.slow

Work = Callable[[CpuOperations], torch.Tensor]


def linear(ops: CpuOperations, tokens: int) -> torch.Tensor:
    return ops.linear(random(0, tokens, 75, dtype=torch.bfloat16), ops.pack(random(1, 200, 75, dtype=torch.bfloat16)))


def quantized_linear(ops: CpuOperations, tokens: int) -> torch.Tensor:
    return ops.linear(random(0, tokens, 128), ops.pack(quantize(random(1, 200, 128), 4)))


def norm(ops: CpuOperations) -> torch.Tensor:
    return ops.norm(random(0, 30, 300), Norm(random(1, 300), None, 1e-5, centered=False))


def attention(ops: CpuOperations) -> torch.Tensor:
    """Attention over a context that is long enough to be divided into parts, which are joined at the end."""
    heads = Heads(query=4, kv=2, dim=64)
    batch, num_blocks = paged_batch([(2600, 1), (10, 30), (0, 1)], seed=0)
    (layer,) = filled_cache(num_blocks, heads, torch.float32, 0).layers
    return ops.attention(random(0, 32, 8 * 64), heads, ops.prepare(batch), layer)


WORK: list[Work] = [
    partial(linear, tokens=1),
    partial(linear, tokens=20),
    partial(quantized_linear, tokens=1),
    partial(quantized_linear, tokens=20),
    norm,
    attention,
]


@pytest.fixture
def on_three_threads() -> Iterator[CpuOperations]:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield cpu_operations(instruction_set())
    torch.set_num_threads(threads)


def expected() -> list[torch.Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [work(cpu_operations(instruction_set())) for work in WORK]
    torch.set_num_threads(threads)
    return alone


def test_several_threads_compute_the_same_as_one(on_three_threads: CpuOperations) -> None:
    for _ in range(20):
        for work, alone in zip(WORK, expected(), strict=True):
            assert work(on_three_threads).equal(alone)


def test_threads_that_call_kernels_at_the_same_time_have_separate_teams(on_three_threads: CpuOperations) -> None:
    alone = expected()

    def compute(number: int) -> bool:
        place = number % len(WORK)
        return WORK[place](on_three_threads).equal(alone[place])

    with ThreadPoolExecutor(3) as callers:
        assert all(callers.map(compute, range(60)))
