"""The CUDA kernels, which only an interpreter runs here, are ones that Triton compiles for real GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = 99 << 10  # bytes that a program can have on all GPUs from compute capability 8.0 on


@pytest.mark.parametrize("capability", ["80", "90"])
def test_all_kernels_compile_and_fit_into_shared_memory(capability: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.shard.compiling_process", capability]
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    compiled = [line.split() for line in result.stdout.splitlines()]
    assert {name for name, _ in compiled} == {
        "_add_rms_norm",
        "_attention",
        "_combine",
        "_expand",
        "_linear",
        "_rotate_and_write",
        "_round",
        "_shrink",
        "_silu_mul",
    }
    assert max(int(shared) for _, shared in compiled) <= SHARED_MEMORY
