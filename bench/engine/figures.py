"""The engine's figures, with their targets. Each is a ratio of two measurements from the same rounds."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch

from bench.engine.experts import mixture
from bench.engine.figure import Figure
from bench.engine.memory import resident_weights
from bench.engine.stepping import Stepper, random_adapter
from bench.engine.timing import in_turns, median_of, ratio, seconds, seconds_per_byte, seconds_per_product
from bench.peft_target import load_model
from loraplex_shard.settings import Quantize

CONTEXT = 128
ROUNDS = 15
WANTED: dict[Quantize, dict[int, float]] = {
    "none": {1: 0.72, 8: 0.65, 32: 0.55},
    "int8": {1: 0.60, 8: 0.50, 32: 0.42},
}


def decoding(steppers: dict[Quantize, Stepper]) -> Iterator[Figure]:
    """How close a decode step comes to the time that it takes to read the weights, and how much quantization saves. The
    detail says how close it comes to the time that a large matrix product of torch needs for the same
    multiplications."""
    works: dict[tuple[str, int], Callable[[], float]] = {
        ("byte", 0): seconds_per_byte(),
        ("product", 0): seconds_per_product(),
    }
    for quantize, stepper in steppers.items():
        for batch in (1, 8, 32):
            works[quantize, batch] = partial(stepper.seconds_per_decode, batch, CONTEXT)
    measured = in_turns(works, ROUNDS)

    def share(what: str, amount: int, quantize: Quantize, batch: int) -> float:
        return median_of(lambda floor, spent: amount * floor / spent, measured[what, 0], measured[quantize, batch])

    def gain(slow: Quantize, fast: Quantize, batch: int) -> float:
        return ratio(measured[slow, batch], measured[fast, batch])

    for quantize, batches in WANTED.items():
        stepper = steppers[quantize]
        for batch, wanted in batches.items():
            name = f"decode step, {'bf16' if quantize == 'none' else quantize}, batch {batch}: memory floor ÷ time"
            products = share("product", batch * stepper.weights, quantize, batch)
            speed = median_of(lambda spent, batch=batch: batch / spent, measured[quantize, batch])
            read = stepper.weight_bytes + stepper.kv_bytes(batch, CONTEXT)
            detail = f"{speed:.0f} tok/s; products alone ÷ time: {products:.2f}"
            yield Figure(name, wanted, share("byte", read, quantize, batch), detail)
    for batch, wanted in ((1, 1.5), (32, 1.25)):
        yield Figure(f"int8 ÷ bf16, tokens/s, batch {batch}", wanted, gain("none", "int8", batch))
    speed = median_of(lambda spent: 1 / spent, measured["int4", 1])
    yield Figure("int4 ÷ int8, tokens/s, batch 1", 1.25, gain("int8", "int4", 1), f"{speed:.0f} tok/s")


def memory() -> Iterator[Figure]:
    """The memory of the weights, as the operating system reports it: bf16's divided by each form's."""
    plain = resident_weights("none")
    for quantize, wanted in cast(tuple[tuple[Quantize, float], ...], (("int8", 0.55), ("int4", 0.35))):
        taken = resident_weights(quantize)
        detail = f"{taken / plain:.3f} of {plain / 1e6:.0f} MB"
        yield Figure(f"resident memory, bf16 ÷ {quantize}", 1 / wanted, plain / taken, detail)


def attention(stepper: Stepper) -> Figure:
    batch, context = 32, 2048
    attend, read = stepper.attention(batch, context), stepper.kv_bytes(batch, context)
    measured = in_turns({"byte": seconds_per_byte(), "attention": lambda: seconds(attend)}, ROUNDS)
    share = median_of(lambda byte, spent: read * byte / spent, measured["byte"], measured["attention"])
    speed = median_of(lambda spent: read / spent, measured["attention"])
    name = "decode attention, context 2,048, batch 32: KV bytes/s ÷ bandwidth"
    return Figure(name, 0.7, share, f"{speed / 1e9:.1f} GB/s")


def prefill(stepper: Stepper) -> Figure:
    tokens = 1024
    model = load_model("default").to(torch.bfloat16).eval()
    ids = torch.arange(1000, 1000 + tokens)[None]

    def theirs() -> None:
        with torch.inference_mode():
            model(ids, logits_to_keep=1)

    works = {"ours": lambda: seconds(lambda: stepper.prefill(1, tokens)), "theirs": lambda: seconds(theirs)}
    measured = in_turns(works, 5)
    gain = ratio(measured["theirs"], measured["ours"])
    speed = median_of(lambda spent: tokens / spent, measured["ours"])
    return Figure("prefill of 1,024 tokens, bf16, tokens/s ÷ transformers", 1.8, gain, f"{speed:.0f} tok/s")


def adapters(stepper: Stepper) -> Iterator[Figure]:
    """How much adapters add to a step of 32 sequences."""
    layouts, batch = stepper.decoder.layouts, 32
    many = [random_adapter(layouts, 16, seed) for seed in range(batch)]
    small = [random_adapter(layouts, 8, seed) for seed in range(batch)]
    step = partial(stepper.seconds_per_decode, batch, CONTEXT)
    works: dict[str, Callable[[], float]] = {
        "byte": seconds_per_byte(),
        "base": step,
        "none": partial(step, many, 0),
        "one": partial(step, many[:1]),
        "8": partial(step, many[:8]),
        "32": partial(step, many),
        "small": partial(step, small),
        "mixed": partial(step, [*small[:31], random_adapter(layouts, 128, 99)]),
    }
    measured = in_turns(works, ROUNDS)

    def speed(of: str, to: str) -> float:
        return ratio(measured[to], measured[of])

    yield Figure("32 adapters loaded, none in the batch ÷ none loaded, tokens/s", 0.99, speed("none", "base"))
    yield Figure("one adapter (r=16) in every row ÷ base, tokens/s, batch 32", 0.92, speed("one", "base"))
    for count in (8, 32):
        size, spent = sum(adapter.size_bytes for adapter in many[:count]), measured[str(count)]
        added = median_of(lambda own, base: own - base, spent, measured["base"])
        # The difference of one round is mostly noise, so the median goes into the ratio.
        floor = median_of(lambda byte, size=size: size * byte, measured["byte"])
        name = f"{count} adapters (r=16), batch 32: memory floor ÷ time added"
        detail = f"{added * 1e3:.1f} ms added; {speed(str(count), 'base'):.2f} of the base's tokens/s"
        yield Figure(name, 0.65, floor / added, detail)
    yield Figure("31 requests at r=8 beside one at r=128 ÷ all at r=8, tokens/s", 0.95, speed("mixed", "small"))


def in_process() -> Iterator[Figure]:
    """All figures that do not need a server."""
    steppers = {quantize: Stepper(quantize) for quantize in cast(tuple[Quantize, ...], ("none", "int8", "int4"))}
    yield from decoding(steppers)
    stepper = steppers.pop("none")
    steppers.clear()
    yield attention(stepper)
    yield from adapters(stepper)
    yield prefill(stepper)
    yield from mixture()
    yield from memory()
