"""All kernels, compiled for this GPU as on a machine that has never run them."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from bench.gpu.check import Check, DeviceName, Row

ROOT = Path(__file__).parents[2]
PROCESSES = 8
HOPPER = 90  # without a GPU
SPILLED = 32  # bytes of a thread that hardly matter


def checks(device: DeviceName) -> Iterator[Check]:
    """Groups are compiled side by side, from the first check on."""
    from tests.shard.compiling_process import KERNELS  # which turns Triton's interpreter off

    groups = list(KERNELS) if device == "cuda" else ["sampling"]
    capability = _capability() if device == "cuda" else HOPPER
    pool = ThreadPoolExecutor(PROCESSES)
    compiled = {group: pool.submit(_compile, group, capability) for group in groups}
    for group, future in compiled.items():
        yield Check(group, partial(_rows, group, future), 100)


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _compile(group: str, capability: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as cold:
        command = [sys.executable, "-m", "tests.shard.compiling_process", str(capability), group]
        env = {**os.environ, "TRITON_CACHE_DIR": cold}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"the compiler ended with status {done.returncode}: {done.stderr[-2000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def _rows(group: str, future: Future[list[Row]]) -> list[Row]:
    columns = "kernel", "seconds", "registers", "spilled", "shared", "wgmma"
    rows: list[Row] = [{"group": group, **{column: row[column] for column in columns}} for row in future.result()]
    spilled = sorted({str(row["kernel"]) for row in rows if int(row["spilled"]) > SPILLED})
    assert not spilled, f"registers are spilled in {', '.join(spilled)}"
    return rows
