"""What choosing tokens adds to a decode step."""

from collections.abc import Iterator
from functools import partial

from bench.gpu.check import Check, DeviceName, Row
from bench.gpu.decode import make_stepper, median_seconds
from loraplex_protos.generation_pb2 import Sampling

SAMPLINGS = {
    "temperature": Sampling(temperature=0.8, seed=1),
    "top-p": Sampling(temperature=0.8, top_p=0.9, seed=1),
    "top-k": Sampling(temperature=0.8, top_k=50, seed=1),
    "typical": Sampling(temperature=0.8, typical_p=0.9, seed=1),
    "penalties": Sampling(temperature=0.8, repetition_penalty=1.2, frequency_penalty=0.5, seed=1),
}
CONTEXT = 128
BATCHES: dict[DeviceName, tuple[int, ...]] = {"cuda": (1, 32, 256), "cpu": (2,)}


def checks(device: DeviceName) -> Iterator[Check]:
    for batch in BATCHES[device]:
        yield Check(f"batch {batch}", partial(_added, device, batch))


def _added(device: DeviceName, batch: int) -> list[Row]:
    stepper = make_stepper(device)
    context = CONTEXT if device == "cuda" else 5
    stepper.start(batch, context)
    greedy = median_seconds(device, stepper.decode)
    rows: list[Row] = []
    for name, sampling in SAMPLINGS.items():
        stepper.start(batch, context, sampling=sampling)
        spent = median_seconds(device, stepper.decode)
        added = (spent - greedy) * 1e3
        rows.append({"batch": batch, "sampling": name, "greedy step, ms": greedy * 1e3, "added, ms": added})
    return rows
