"""Adapters on their way to the device, and steps meanwhile."""

import statistics
import threading
from collections.abc import Iterator
from functools import partial

import torch

from bench.engine.stepping import random_adapter
from bench.engine.timing import seconds
from bench.gpu.check import Check, DeviceName, Row
from bench.gpu.decode import make_stepper
from bench.load import percentile
from loraplex_protos.errors import OverloadedError
from loraplex_shard.lora.weights.transfer import Transfer

LORA_RANKS: dict[DeviceName, tuple[int, ...]] = {"cuda": (16, 64), "cpu": (3,)}
LOADS = 5
STEPS: dict[DeviceName, int] = {"cuda": 100, "cpu": 1}
BATCH, CONTEXT = 32, 1024
LEFT = 16 << 20  # bytes of a full device, less than an adapter needs
MOST = 10  # adapters that what torch holds in reserve may have room for


def checks(device: DeviceName) -> Iterator[Check]:
    for lora_rank in LORA_RANKS[device]:
        yield Check(f"load r={lora_rank}", partial(_load, device, lora_rank))
    yield Check("steps while adapters load", partial(_steps, device))
    if device == "cuda":
        yield Check("a full device refuses an adapter, and goes on", _full)


def _load(device: DeviceName, lora_rank: int) -> Row:
    stepper = make_stepper(device)
    transfer = Transfer(stepper.decoder.device)
    adapter = random_adapter(stepper.decoder.layouts, lora_rank, 0, stepper.decoder.dtype)
    took = statistics.median(seconds(lambda: transfer.to_device(adapter)) for _ in range(LOADS))
    size = adapter.size_bytes
    return {"what": f"load r={lora_rank}", "MB": size / 1e6, "ms": took * 1e3, "GB/s": size / took / 1e9}


def _steps(device: DeviceName) -> list[Row]:
    """How long steps take while one adapter after the other is loaded."""
    stepper = make_stepper(device)
    transfer = Transfer(stepper.decoder.device)
    adapter = random_adapter(stepper.decoder.layouts, 16, 0, stepper.decoder.dtype)
    ended, loads = threading.Event(), 0

    def load() -> None:
        nonlocal loads
        while not ended.is_set():
            transfer.to_device(adapter)
            loads += 1
            ended.wait(0.001)

    rows: list[Row] = []
    for beside in (False, True):
        stepper.start(*((BATCH, CONTEXT) if device == "cuda" else (1, 5)))
        stepper.decode()
        thread = threading.Thread(target=load)
        if beside:
            thread.start()
        spent = [seconds(stepper.decode) for _ in range(STEPS[device])]
        if beside:
            ended.set()
            thread.join()
        name = "steps while adapters load" if beside else "steps alone"
        row: Row = {"what": name, "loads": loads, "ms": statistics.median(spent) * 1e3}
        rows.append(row | {"p99, ms": percentile(spent, 99) * 1e3})
    return rows


def _full() -> Row:
    stepper = make_stepper("cuda")
    transfer = Transfer(stepper.decoder.device)
    adapter = random_adapter(stepper.decoder.layouts, 16, 0, stepper.decoder.dtype)
    stepper.start(1, CONTEXT)
    for _ in range(3):  # is recorded
        stepper.decode()
    torch.cuda.empty_cache()
    filler = torch.empty(torch.cuda.mem_get_info()[0] - LEFT, dtype=torch.uint8, device="cuda")
    copies = []
    try:
        for _ in range(MOST):
            copies.append(transfer.to_device(adapter))
        raise AssertionError(f"{MOST} adapters were loaded, though the device is full")
    except OverloadedError as error:
        refusal = error.message
    stepper.decode()  # steps need little
    del filler, copies
    torch.cuda.empty_cache()
    transfer.to_device(adapter)
    return {"what": refusal}
