"""Memory for what every step reads."""

import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from loraplex_shard.memory import HUGE_PAGE, keep_freed, reserve


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_is_zero_and_starts_where_a_huge_page_may() -> None:
    memory = reserve(3 * HUGE_PAGE + 5)
    assert memory.shape == (3 * HUGE_PAGE + 5,)
    assert memory.data_ptr() % HUGE_PAGE == 0
    assert not memory.any()


def test_memory_that_nobody_touched_is_not_resident() -> None:
    before = resident_bytes()
    memory = reserve(1 << 30)
    memory[:: 1 << 29] = 1
    assert resident_bytes() - before < 64 << 20


def test_no_bytes_can_be_reserved() -> None:
    assert reserve(0).shape == (0,)


def page_faults_of_equal_steps() -> int:
    keep_freed()
    for step in range(50):
        if step == 40:  # until then, what is freed by one step may lie so that the next one takes other memory
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.zeros(size << 20, dtype=torch.uint8) for size in (3, 10, 20)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_used_again_without_asking_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # as a shard has it
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        assert process.submit(page_faults_of_equal_steps).result() < 100
