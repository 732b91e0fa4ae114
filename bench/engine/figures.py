"""The engine's figures: what is measured, and what is wanted. Every figure is a ratio of two things of one run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch

from bench.engine.memory import resident_weights
from bench.engine.stepping import Stepper, median_seconds, multiply_rate, random_adapter, read_bandwidth
from bench.peft_target import load_model
from loraplex_shard.lora.weights import AdapterWeights
from loraplex_shard.settings import Quantize

CONTEXT = 128
WANTED = {
    "none": {1: 0.72, 8: 0.65, 32: 0.55},
    "int8": {1: 0.60, 8: 0.50, 32: 0.42},
}


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    wanted: float
    measured: float
    detail: str = ""


def decoding(bandwidth: float, rate: float) -> Iterator[Figure]:
    """How near a decode step comes to the time in which memory is read, and what quantizing brings. Beside it, how near
    it comes to the time in which this processor multiplies as much in a large matrix product of torch's."""
    seconds: dict[tuple[Quantize, int], float] = {}
    for quantize in cast(tuple[Quantize, ...], ("none", "int8", "int4")):
        stepper = Stepper(quantize)
        for batch in (1, 8, 32):
            stepper.fill(batch, CONTEXT - 8)
            spent = seconds[quantize, batch] = stepper.seconds_per_decode()
            floor = (stepper.weight_bytes + stepper.kv_bytes(batch, CONTEXT)) / bandwidth
            if quantize in WANTED:
                name = f"decode step, {'bf16' if quantize == 'none' else quantize}, batch {batch}: memory floor ÷ time"
                detail = (
                    f"{batch / spent:.0f} tok/s; products alone ÷ time: {batch * stepper.weights / rate / spent:.2f}"
                )
                yield Figure(name, WANTED[quantize][batch], floor / spent, detail)
    for batch, wanted in ((1, 1.5), (32, 1.25)):
        ratio = seconds["none", batch] / seconds["int8", batch]
        yield Figure(f"int8 ÷ bf16, tokens/s, batch {batch}", wanted, ratio)
    detail = f"{1 / seconds['int4', 1]:.0f} tok/s"
    yield Figure("int4 ÷ int8, tokens/s, batch 1", 1.25, seconds["int8", 1] / seconds["int4", 1], detail)


def memory() -> Iterator[Figure]:
    """What the weights take, as the operating system sees it: bf16's share over that of each form."""
    plain = resident_weights("none")
    for quantize, wanted in cast(tuple[tuple[Quantize, float], ...], (("int8", 0.55), ("int4", 0.35))):
        taken = resident_weights(quantize)
        detail = f"{taken / plain:.3f} of {plain / 1e6:.0f} MB"
        yield Figure(f"resident memory, bf16 ÷ {quantize}", 1 / wanted, plain / taken, detail)


def attention(stepper: Stepper, bandwidth: float) -> Figure:
    """The operation alone, in all layers one after the other: no processor cache holds that much."""
    batch, context = 32, 2048
    read = stepper.kv_bytes(batch, context) / stepper.seconds_of_attention(batch, context)
    detail = f"{read / 1e9:.1f} GB/s"
    return Figure("decode attention, context 2,048, batch 32: KV bytes/s ÷ bandwidth", 0.7, read / bandwidth, detail)


def prefill(stepper: Stepper) -> Figure:
    tokens = 1024
    ours = median_seconds(lambda: stepper.fill(1, tokens), 5)
    model = load_model("default").to(torch.bfloat16).eval()
    ids = torch.arange(1000, 1000 + tokens)[None]
    with torch.inference_mode():
        theirs = median_seconds(lambda: model(ids, logits_to_keep=1), 3)
    name = "prefill of 1,024 tokens, bf16, tokens/s ÷ transformers"
    return Figure(name, 1.8, theirs / ours, f"{tokens / ours:.0f} tok/s")


def adapters(stepper: Stepper, bandwidth: float) -> Iterator[Figure]:
    """What adapters add to a step of 32 sequences."""
    layouts, batch = stepper.decoder.layouts, 32

    def seconds(chosen: list[AdapterWeights], adapted: int = batch) -> float:
        stepper.fill(batch, CONTEXT - 8, chosen, adapted)
        return stepper.seconds_per_decode()

    many = [random_adapter(layouts, 16, seed) for seed in range(batch)]
    base, one = seconds([]), seconds([many[0]] * batch)
    yield Figure("32 adapters loaded, none in the batch ÷ none loaded, tokens/s", 0.99, base / seconds(many, adapted=0))
    yield Figure("one adapter (r=16) in every row ÷ base, tokens/s, batch 32", 0.92, base / one)
    for count in (8, 32):
        spread = seconds([many[row * count // batch] for row in range(batch)])
        floor = sum(adapter.size_bytes for adapter in many[:count]) / bandwidth
        detail = f"{(spread - base) * 1e3:.1f} ms added"
        yield Figure(
            f"{count} adapters (r=16), batch 32: memory floor ÷ time added", 0.65, floor / (spread - base), detail
        )
    small = [random_adapter(layouts, 8, seed) for seed in range(batch)]
    large = random_adapter(layouts, 128, 99)
    alike, mixed = seconds(small), seconds([*small[:31], large])
    yield Figure("31 requests at r=8 beside one at r=128 ÷ all at r=8, tokens/s", 0.95, alike / mixed)


def in_process() -> Iterator[Figure]:
    """All figures that need no server."""
    bandwidth = read_bandwidth()
    yield from decoding(bandwidth, multiply_rate())
    yield from memory()
    stepper = Stepper("none")
    yield attention(stepper, bandwidth)
    yield prefill(stepper)
    yield from adapters(stepper, bandwidth)
