"""What the machine is, and what it can do at most: the bytes and the products per second that floors are made of."""

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
import transformers
import triton

from bench.gpu.check import Check, DeviceName, Row


@dataclass(frozen=True, slots=True)
class Ceilings:
    bytes_per_second: float  # of a large copy, read and written bytes together
    flops: float  # of a large product in bfloat16, two for each multiplication


def checks(device: DeviceName) -> Iterator[Check]:
    yield Check("machine", partial(_machine, device))
    yield Check("compiler", _compiler)
    yield Check("ceilings", partial(_ceilings, device))


def seconds(device: DeviceName, work: Callable[[], object], rounds: int = 20) -> float:
    """The median time of the work, after runs that do not count, with the device's own clock if it has one."""
    rounds = rounds if device == "cuda" else 1
    for _ in range(3 if device == "cuda" else 0):
        work()
    return statistics.median(_timed(device, work) for _ in range(rounds))


def _timed(device: DeviceName, work: Callable[[], object]) -> float:
    if device == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def captured(device: DeviceName, work: Callable[[], object]) -> Callable[[], object]:
    """The work without the host's part of it."""
    if device == "cpu":
        return work
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@cache
def ceilings(device: DeviceName) -> Ceilings:
    """Measured anew by each section, since a GPU's clock changes."""
    size, side = (1 << 30, 8192) if device == "cuda" else (1 << 20, 64)
    source, target = torch.ones(2, size, dtype=torch.uint8, device=device)
    spent = seconds(device, lambda: target.copy_(source))
    a, b = torch.randn(2, side, side, device=device).bfloat16()
    return Ceilings(2 * size / spent, 2 * side**3 / seconds(device, lambda: a @ b))


def _machine(device: DeviceName) -> list[Row]:
    found: dict[str, str] = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "Triton": triton.__version__,
        "transformers": transformers.__version__,
        "cores": str(os.cpu_count()),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        found |= {
            "GPU": f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} SMs",
            "memory": f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
            "driver": _driver(),
            "CUDA": str(torch.version.cuda),
        }
    return [{"what": name, "found": value} for name, value in found.items()]


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not installed"
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()


def _compiler() -> Row:
    """Triton compiles its launchers with it, at run time."""
    found = next((path for name in (os.environ.get("CC"), "gcc", "clang") if name and (path := shutil.which(name))), "")
    assert found, "no C compiler: Triton needs gcc or clang to launch kernels; install one, or name it as CC"
    return {"what": "C compiler", "found": found}


def _ceilings(device: DeviceName) -> list[Row]:
    found = ceilings(device)
    return [
        {"what": "copy, TB/s", "found": f"{found.bytes_per_second / 1e12:.3f}"},
        {"what": "product in bfloat16, TFLOP/s", "found": f"{found.flops / 1e12:.1f}"},
    ]
