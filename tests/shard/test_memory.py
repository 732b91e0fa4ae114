"""Memory for data that every step reads."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from loraplex_shard.device.memory import HUGE_PAGE, keep_freed, reserve

pytestmark = pytest.mark.slow


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_is_zero_and_aligned_to_huge_pages() -> None:
    memory = reserve(3 * HUGE_PAGE + 5)
    assert memory.shape == (3 * HUGE_PAGE + 5,)
    assert memory.data_ptr() % HUGE_PAGE == 0
    assert not memory.any()


def test_untouched_memory_is_not_resident() -> None:
    before = resident_bytes()
    memory = reserve(1 << 30)
    memory[:: 1 << 29] = 1
    assert resident_bytes() - before < 64 << 20


def test_touched_memory_takes_no_more_than_was_asked_for() -> None:
    before = resident_bytes()
    tensors = [reserve(HUGE_PAGE + 4096).fill_(1) for _ in range(20)]  # a huge page for the rest would be half of it
    assert resident_bytes() - before < sum(tensor.nbytes for tensor in tensors) + (4 << 20)


def test_zero_bytes_can_be_reserved() -> None:
    assert reserve(0).shape == (0,)


def memory_kept_of_a_freed_tensor() -> int:
    keep_freed()
    before = resident_bytes()
    tensor = torch.ones(20 << 20, dtype=torch.uint8)
    del tensor
    return resident_bytes() - before


def test_freed_memory_stays_with_the_process() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        assert process.submit(memory_kept_of_a_freed_tensor).result() > 19 << 20
