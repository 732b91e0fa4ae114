"""Triton compiles the CUDA kernels, which only run in its interpreter here, for real GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shard.operations import cache_directory

pytestmark = pytest.mark.slow

CAPABILITIES = "80", "90"
SHARED_MEMORY = 99 << 10  # bytes that a program may use on all GPUs with compute capability 8.0 or more
KERNELS = {
    "_activate",
    "_add_norm",
    "_attention",
    "_combine",
    "_expand",
    "_expert_linear",
    "_linear",
    "_rotate_and_write",
    "_round",
    "_shrink",
}


def test_all_kernels_compile_fit_into_shared_memory_and_read_16_bytes_of_adapters_at_a_time() -> None:
    command = [sys.executable, "-m", "tests.shard.compiling_process", *CAPABILITIES]
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache_directory("triton"))}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    compiled = [line.split() for line in result.stdout.splitlines()]
    assert {(capability, kernel) for capability, kernel, _, _ in compiled} == {
        (capability, kernel) for capability in CAPABILITIES for kernel in KERNELS
    }
    assert max(int(shared) for _, _, shared, _ in compiled) <= SHARED_MEMORY
    reading_adapters = [int(wide) for _, kernel, _, wide in compiled if kernel in ("_shrink", "_expand")]
    assert min(reading_adapters) > 0, "an adapter's weights are read one value at a time"
