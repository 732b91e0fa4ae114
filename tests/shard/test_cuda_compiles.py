"""Triton compiles the CUDA kernels, which only run in its interpreter here, for real GPUs."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tests.shard.operations import cache_directory

pytestmark = pytest.mark.slow

CAPABILITIES = 80, 90
SHARED_MEMORY = 99 << 10  # bytes that a program may use on all GPUs with compute capability 8.0 or more
SPILLED = 8  # bytes of a thread
REGISTERS = 64 << 10  # of a multiprocessor
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


def test_all_kernels_compile_fit_into_shared_memory_and_registers_and_read_16_bytes_of_adapters_at_a_time() -> None:
    command = [sys.executable, "-m", "tests.shard.compiling_process", *map(str, CAPABILITIES)]
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache_directory("triton"))}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    assert {(each["capability"], each["kernel"]) for each in compiled} == set(product(CAPABILITIES, KERNELS))
    assert max(each["shared"] for each in compiled) <= SHARED_MEMORY
    for each in compiled:
        assert each["spilled"] <= SPILLED, each
        if each["kernel"] in ("_shrink", "_expand"):
            assert each["wide"] > 0, f"an adapter's weights are read one value at a time: {each}"
            assert each["registers"] * 256 <= REGISTERS, f"the programs do not fit side by side: {each}"
