"""Where a decode step's time goes, by torch's profiler."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity

from bench.engine.stepping import Stepper
from bench.gpu.check import Check, DeviceName, Row
from bench.gpu.checkpoints import many_adapters
from bench.gpu.decode import Load, make_stepper

LOADS: dict[DeviceName, tuple[Load, ...]] = {
    "cuda": (*(Load(batch, 1024) for batch in (1, 32, 256)), Load(1, 1024, 1), Load(32, 1024, 32), Load(128, 1024, 32)),
    "cpu": (Load(1, 20),),
}
STEPS = 5
TRACED: dict[DeviceName, Load] = {"cuda": Load(32, 1024, 32), "cpu": Load(1, 20)}
TRACE = "trace.json.gz"
LARGEST_TRACE = 16 << 20  # bytes
TOP = 12  # kernels
LAUNCH, COPY, WAIT = "Launch", "emcpyAsync", "Synchronize"  # in the names of CUDA's functions


def host(device: DeviceName) -> Iterator[Check]:
    """On a machine with a GPU, whose processor is the one that matters. In Triton's interpreter there are no
    launches."""
    if device == "cuda":
        yield Check("decode", _host)


def steps(device: DeviceName) -> Iterator[Check]:
    for load in LOADS[device]:
        yield Check(str(load), partial(_breakdown, device, load))


def trace(folder: Path, device: DeviceName) -> Iterator[Check]:
    """For chrome://tracing or https://ui.perfetto.dev."""
    yield Check(str(TRACED[device]), partial(_trace, folder, device))


def kernels(device: DeviceName) -> Iterator[Check]:
    for load in LOADS[device]:
        yield Check(str(load), partial(_kernels, device, load))


def _host() -> list[Row]:
    from bench.gpu.host import host_rows  # which sets Triton up for a GPU that is not there

    return host_rows()


def _breakdown(device: DeviceName, load: Load) -> Row:
    """Of one step: calls of the host, and how much of the time the GPU computes."""
    events = _profiled(device, load)
    calls = Counter(kind for event in events for kind in (LAUNCH, COPY, WAIT) if _is_call(event, kind))
    ran = sorted((event.time_range.start, event.time_range.end) for event in events if _is_on_gpu(event))
    busy, gap = sum(end - start for start, end in ran), 0.0
    last = 0.0
    for (_, end), (start, _) in pairwise(ran):
        last = max(last, end)
        gap = max(gap, start - last)
    whole = (max(end for _, end in ran) - ran[0][0]) if ran else 0.0
    return {
        "step": str(load),
        "launches": calls[LAUNCH] / STEPS,
        "copies": calls[COPY] / STEPS,
        "waits": calls[WAIT] / STEPS,
        "ms": whole / STEPS / 1e3,
        "GPU busy, ms": busy / STEPS / 1e3,
        "GPU busy, %": 100 * busy / whole if whole else 0.0,
        "longest gap, us": gap,
    }


def _kernels(device: DeviceName, load: Load) -> list[Row]:
    spent, launches = Counter[str](), Counter[str]()
    for event in _profiled(device, load):
        if _is_on_gpu(event) or device == "cpu":
            spent[event.name[:70]] += event.time_range.elapsed_us()
            launches[event.name[:70]] += 1
    whole = sum(spent.values())
    return [
        {
            "step": str(load),
            "us": us / STEPS,
            "%": 100 * us / whole,
            "launches": launches[name] / STEPS,
            "kernel": name,
        }
        for name, us in spent.most_common(TOP)
    ]


def _trace(folder: Path, device: DeviceName) -> Row:
    file = folder / TRACE
    _profile(device, TRACED[device]).export_chrome_trace(str(file))
    size = file.stat().st_size
    if size > LARGEST_TRACE:
        file.unlink()
        raise AssertionError(f"{size:,} bytes of trace are too many: {file} is not kept")
    return {"file": str(file), "bytes": size}


def _profiled(device: DeviceName, load: Load) -> list[Any]:
    return list(_profile(device, load).events() or ())  # type: ignore[no-untyped-call]


def _profile(device: DeviceName, load: Load) -> torch.profiler.profile:
    stepper: Stepper = make_stepper(device)
    layouts, dtype = stepper.decoder.layouts, stepper.decoder.dtype
    stepper.start(load.batch, load.context, many_adapters(layouts, load.lora_rank, load.adapters, dtype, device))
    for _ in range(3 if device == "cuda" else 1):
        stepper.decode()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    profiler = torch.profiler.profile(activities=activities)
    with profiler:
        for _ in range(STEPS if device == "cuda" else 1):
            stepper.decode()
        if device == "cuda":
            torch.cuda.synchronize()
    stepper.start(1, 1)  # forgets the adapters
    return profiler


def _is_on_gpu(event: Any) -> bool:
    return bool(event.device_type == DeviceType.CUDA)


def _is_call(event: Any, kind: str) -> bool:
    """Whether the host called a function of CUDA of this kind."""
    return not _is_on_gpu(event) and event.name.startswith("cu") and kind in event.name
