"""How long steps take: decodes over batch, context and adapters, and prompts, beside the least that the device
needs."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch

from bench.engine.stepping import Stepper
from bench.gpu.check import Check, DeviceName, Row
from bench.gpu.checkpoints import load, many_adapters, real, tiny
from bench.gpu.environment import captured, ceilings, seconds
from loraplex_shard.serving.memory import BLOCK_SIZE
from loraplex_shard.settings import Quantize

MODEL = "Llama 3 8B"
# Least shares of the floor in bfloat16 at 1,024 tokens, by batch, without adapters and with one in all rows.
WANTED = {(1, 0): 0.80, (32, 0): 0.80, (256, 0): 0.75, (1, 1): 0.65, (32, 1): 0.70, (256, 1): 0.65}


@dataclass(frozen=True, slots=True)
class Load:
    """What a step computes."""

    batch: int
    context: int
    adapters: int = 0
    lora_rank: int = 16

    def __str__(self) -> str:
        adapters = f", {self.adapters} adapters r={self.lora_rank}" if self.adapters else ""
        return f"batch {self.batch}, context {self.context}{adapters}"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured on a device."""

    loads: tuple[Load, ...]
    other: tuple[Load, ...]  # for other forms than bfloat16
    prompts: tuple[int, ...]
    chunk: int
    max_model_len: int
    steps: int


FULL = Sizes(
    loads=(
        *(Load(batch, 1024) for batch in (1, 8, 32, 64, 128, 256)),
        *(Load(batch, context) for batch in (1, 32) for context in (128, 4096)),
        Load(256, 128),
        *(Load(batch, 1024, 1) for batch in (1, 32, 256)),
        *(Load(32, 1024, adapters) for adapters in (8, 32)),
        Load(32, 1024, 32, 64),
        Load(128, 1024, 128),
        Load(256, 128, 256),
    ),
    other=(Load(1, 1024), Load(32, 1024), Load(128, 1024)),
    prompts=(256, 2048, 8192),
    chunk=2048,
    max_model_len=8448,
    steps=20,
)
SMALL = Sizes((Load(1, 20), Load(2, 20, 2, 3)), (Load(1, 20),), (17,), 16, 64, 1)
SIZES = {"cuda": FULL, "cpu": SMALL}


@dataclass(frozen=True, slots=True)
class Form:
    """What the model and its cache are held in."""

    dtype: torch.dtype = torch.bfloat16
    quantize: Quantize = "none"
    kv_dtype: torch.dtype | None = None


PLAIN = Form()
OTHER = {
    "float16": Form(torch.float16),
    "int8": Form(quantize="int8"),
    "int4": Form(quantize="int4"),
    "fp8": Form(quantize="fp8"),
    "KV cache int8": Form(kv_dtype=torch.int8),
    "KV cache fp8": Form(kv_dtype=torch.float8_e4m3fn),
}


def decodes(device: DeviceName) -> Iterator[Check]:
    for load_ in SIZES[device].loads:
        yield Check(str(load_), partial(_decode, device, PLAIN, load_))


def prompts(device: DeviceName) -> Iterator[Check]:
    for tokens in SIZES[device].prompts:
        for adapters in (0, 1):
            name = f"prompt of {tokens} tokens, {adapters} adapters"
            yield Check(name, partial(_prompt, device, tokens, adapters))


def other(form: str, device: DeviceName) -> Iterator[Check]:
    for load_ in SIZES[device].other:
        yield Check(str(load_), partial(_decode, device, OTHER[form], load_))


@cache
def make_stepper(device: DeviceName, form: Form = PLAIN) -> Stepper:
    """The model, with as much cache as the loads need. A process has room for one."""
    of = SIZES[device]
    config = real(MODEL) if device == "cuda" else tiny(MODEL)
    dtype = form.dtype if device == "cuda" else torch.float16  # Triton's interpreter cannot multiply bfloat16
    decoder = load(config, device, dtype, form.quantize, of.max_model_len)
    ends = ((each.batch, each.context + of.steps + 4) for each in (*of.loads, Load(1, of.max_model_len)))
    blocks = max(batch * -(-end // BLOCK_SIZE) for batch, end in ends)
    sequences = max(each.batch for each in of.loads)
    return Stepper(form.quantize, dtype, decoder, sequences, of.max_model_len, blocks, form.kv_dtype)


def _decode(device: DeviceName, form: Form, load_: Load) -> Row:
    stepper = make_stepper(device, form)
    layouts, dtype = stepper.decoder.layouts, stepper.decoder.dtype
    adapters = many_adapters(layouts, load_.lora_rank, load_.adapters, dtype, device)
    stepper.start(load_.batch, load_.context, adapters)
    spent = median_seconds(device, stepper.decode)
    stepper.start(1, 1)  # forgets the adapters
    read = stepper.weight_bytes + stepper.kv_bytes(load_.batch, load_.context)
    read += sum(adapter.size_bytes for adapter in adapters)
    found = ceilings(device)
    floor = max(read / found.bytes_per_second, 2 * stepper.weights * load_.batch / found.flops)
    wanted = WANTED.get((load_.batch, load_.adapters)) if form == PLAIN and load_.context == 1024 else None
    return {
        "batch": load_.batch,
        "context": load_.context,
        "adapters": load_.adapters,
        "r": load_.lora_rank if load_.adapters else 0,
        "ms": spent * 1e3,
        "tokens/s": load_.batch / spent,
        "floor, ms": floor * 1e3,
        "floor ÷ time": floor / spent,
        "wanted": "" if wanted is None else wanted,
        "linears alone, ms": (alone := _linears_alone(device, form, load_.batch)) * 1e3,
        "linears ÷ time": alone / spent,
    }


@cache
def _linears_alone(device: DeviceName, form: Form, batch: int) -> float:
    """Seconds of torch's products alone, recorded as one graph: what remains if all else cost nothing."""
    return seconds(device, captured(device, make_stepper(device, form).linears(batch)))


def _prompt(device: DeviceName, tokens: int, adapters: int) -> Row:
    stepper, of = make_stepper(device), SIZES[device]
    many = many_adapters(stepper.decoder.layouts, 16, adapters, stepper.decoder.dtype, device)
    spent = median_seconds(device, lambda: stepper.prefill(1, tokens, many, of.chunk), rounds=3)
    flops = 2 * stepper.weights * tokens / spent
    return {
        "prompt": tokens,
        "adapters": adapters,
        "ms": spent * 1e3,
        "tokens/s": tokens / spent,
        "TFLOP/s": flops / 1e12,
        "floor ÷ time": flops / ceilings(device).flops,
    }


def median_seconds(device: DeviceName, step: Callable[[], None], rounds: int | None = None) -> float:
    """The median time of a step by the host's clock, after two that do not count, until the device has done it."""
    spent = []
    for _ in range((rounds or SIZES[device].steps) + 2 if device == "cuda" else 1):
        began = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[2:] or spent)
