"""What the largest steps take of the device's memory beside weights, cache and adapters."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.engine.stepping import Stepper
from bench.gpu.check import Check, DeviceName, Row
from bench.gpu.checkpoints import many_adapters
from bench.gpu.decode import SIZES, make_stepper
from loraplex_protos.generation_pb2 import Sampling

MIB = 1 << 20
TOP_P = Sampling(temperature=1.0, top_p=0.9, seed=1)


def checks(device: DeviceName) -> Iterator[Check]:
    stepper = make_stepper(device)
    chunk = SIZES[device].chunk
    batch = max(load.batch for load in SIZES[device].loads)
    one = many_adapters(stepper.decoder.layouts, 16, 1, stepper.decoder.dtype, device)
    yield Check("weights and cache", partial(_held, device, stepper))
    works: dict[str, Callable[[], None]] = {
        f"a prompt of {chunk} tokens": lambda: stepper.prefill(1, chunk, chunk=chunk),
        f"a prompt of {chunk} tokens with an adapter": lambda: stepper.prefill(1, chunk, one, chunk),
        f"{batch} decodes": partial(_decode, stepper, batch, Sampling()),
        f"{batch} decodes, top-p": partial(_decode, stepper, batch, TOP_P),
    }
    for name, work in works.items():
        yield Check(name, partial(_peak, device, name, work))


def _held(device: DeviceName, stepper: Stepper) -> list[Row]:
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in stepper.cache.layers)
    rows: list[Row] = [
        {"what": "weights", "MiB": stepper.weight_bytes / MIB},
        {"what": "cache", "MiB": cache / MIB},
    ]
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        rows.append({"what": "reserved by torch", "MiB": reserved / MIB})
        rows.append({"what": "reserved, but not used", "MiB": (reserved - allocated) / MIB})
        rows.append({"what": "CUDA's own and other processes'", "MiB": (total - free - reserved) / MIB})
    return rows


def _decode(stepper: Stepper, batch: int, sampling: Sampling) -> None:
    stepper.start(batch, 16, sampling=sampling)
    stepper.decode()
    stepper.decode()


def _peak(device: DeviceName, what: str, work: Callable[[], None]) -> Row:
    work()
    if device == "cpu":
        return {"what": what, "MiB": 0.0}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return {"what": what, "MiB": (torch.cuda.max_memory_allocated() - before) / MIB}
