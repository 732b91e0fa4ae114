"""Triton compiles the CUDA kernels, which only run in its interpreter here, for real GPUs."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from filelock import FileLock

from tests.shard.operations import cache_directory

pytestmark = pytest.mark.slow

OLDER = "triton==3.6.0"  # which torch 2.11 needs
CAPABILITIES = [pytest.param(False, (80, 90, 100), id="installed"), pytest.param(True, (90,), id="older")]
SHARED_MEMORY = 99 << 10  # bytes that a program may use on all GPUs with compute capability 8.0 or more
REGISTERS = 64 << 10  # of a multiprocessor
SPILLED = 32  # bytes of a thread that hardly matter
TWO_ITERATIONS = 2 * 2 * 64 * 128  # bytes of an int8 cache's keys and values
KERNELS = {
    "_activate",
    "_add_norm",
    "_attention",
    "_combine",
    "_dequantize",
    "_draw",
    "_expand",
    "_expert_linear",
    "_linear",
    "_rotate_and_write",
    "_round",
    "_round_to_float8",
    "_shrink",
    "_unpack",
    "_upcast",
}


@pytest.fixture
def older_triton(pytestconfig: pytest.Config) -> Path:
    """A folder with the older Triton, which is kept between runs."""
    folder = pytestconfig.cache.mkdir(OLDER)
    complete = folder / "complete"
    with FileLock(folder / "lock"):
        if not complete.exists():
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, OLDER]
            subprocess.run(command, check=True)
            complete.touch()
    return folder


@pytest.mark.parametrize(("older", "capabilities"), CAPABILITIES)
def test_all_kernels_compile_and_use_the_gpu_well(
    older: bool, capabilities: tuple[int, ...], request: pytest.FixtureRequest
) -> None:
    command = [sys.executable, "-m", "tests.shard.compiling_process", *map(str, capabilities)]
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache_directory("triton"))}
    if older:
        paths = str(request.getfixturevalue("older_triton")), os.environ.get("PYTHONPATH", "")
        env["PYTHONPATH"] = os.pathsep.join(paths)
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    assert {(each["capability"], each["kernel"]) for each in compiled} == {
        (capability, kernel)
        for capability, kernel in product(capabilities, KERNELS)
        if capability >= 89 or kernel != "_round_to_float8"
    }
    for each in compiled:
        assert each["shared"] <= SHARED_MEMORY and each["spilled"] <= SPILLED, each
        if each["kernel"] in ("_shrink", "_expand"):
            assert each["wide"] > 0, f"an adapter's weights are read one value at a time: {each}"
        if each["kernel"] == "_attention":
            assert each["shared"] > TWO_ITERATIONS, f"keys and values are not loaded ahead: {each}"
    expand = [each["registers"] for each in compiled if (each["kernel"], each["capability"]) == ("_expand", 90)]
    assert max(expand[:2]) * 256 <= REGISTERS // 2, "two programs for adapters in bfloat16 do not fit side by side"
    assert all(any(e["wgmma"] for e in compiled if e["kernel"] == name) for name in ("_attention", "_expert_linear"))
