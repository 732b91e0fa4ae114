"""Each kind of kernel alone, in the shapes of Llama 3 8B: bytes and products per second, and what was compiled."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu.batches import batch_of
from bench.gpu.check import Check, DeviceName, Row
from bench.gpu.checkpoints import many_adapters
from bench.gpu.decode import make_stepper
from bench.gpu.environment import captured, ceilings, seconds
from loraplex_shard.ops.base import Norm
from loraplex_shard.ops.cuda import attention, elementwise, experts, int4, lora, quantized, rotary
from loraplex_shard.ops.quantized import quantize
from loraplex_shard.shapes.batch import Segment

MODULES = attention, elementwise, experts, int4, lora, quantized, rotary
OUR_INT4 = "int4 by our kernels"  # which are for shapes that torch's product does not take


def checks(device: DeviceName) -> Iterator[Check]:
    full = device == "cuda"
    for tokens, adapters in ((1, 1), (32, 1), (32, 32), (128, 32), (2048, 1)) if full else ((3, 2),):
        yield Check(f"adapters, {tokens} tokens, {adapters} adapters", partial(_lora, device, tokens, adapters))
    for form in ("none", "int8", "int4", OUR_INT4):
        for tokens in (1, 16, 64, 128, 256, 2048) if full else (3,):
            yield Check(f"linear, {form}, {tokens} tokens", partial(_linear, device, form, tokens))
    for tokens in (1, 256, 2048) if full else (3,):
        yield Check(f"norm and activation, {tokens} tokens", partial(_elementwise, device, tokens))
    yield Check("registers", compiled)


def kernel_row(
    device: DeviceName, kernel: str, shape: str, work: Callable[[], object], read: float, flops: float
) -> Row:
    """The kernel's speed, if it moves that many bytes and computes that many products and sums."""
    spent, found = seconds(device, captured(device, work)), ceilings(device)
    floor = max(read / found.bytes_per_second, flops / found.flops)
    return {
        "kernel": kernel,
        "shape": shape,
        "us": spent * 1e6,
        "TB/s": read / spent / 1e12,
        "TFLOP/s": flops / spent / 1e12,
        "floor ÷ time": floor / spent,
    }


def _lora(device: DeviceName, tokens: int, count: int) -> Row:
    """The qkv layer of all layers, one after the other: too much for the GPU's cache."""
    stepper = make_stepper(device)
    ops, where, dtype = stepper.decoder.ops, stepper.decoder.device, stepper.decoder.dtype
    layouts = [layout for layout in stepper.decoder.layouts if layout.name.endswith("qkv")]
    adapters = many_adapters(stepper.decoder.layouts, 16, count, dtype, device)
    each = tokens // count
    segments = tuple(Segment(i * each, (i + 1) * each, adapter) for i, adapter in enumerate(adapters))
    x = torch.randn(tokens, layouts[0].in_features, device=where).to(dtype)
    out = torch.zeros(tokens, sum(part.width for part in layouts[0].parts), device=where, dtype=dtype)
    step = ops.prepare(batch_of([(0, each) for _ in adapters], where, segments=segments)[0])

    def work() -> None:
        for layout in layouts:
            ops.add_lora_delta(out, x, step, layout)

    tensors = [tensor for layout in layouts for tensor in adapters[0].layers[layout.name].tensors]
    read = count * sum(tensor.nbytes for tensor in tensors)
    flops = 2.0 * tokens * sum(tensor.numel() for tensor in tensors)
    return kernel_row(device, "adapters' qkv, all layers", f"{tokens} tokens, {count} adapters", work, read, flops)


def _linear(device: DeviceName, form: str, tokens: int) -> Row:
    stepper = make_stepper(device)
    ops, where, dtype = stepper.decoder.ops, stepper.decoder.device, stepper.decoder.dtype
    outputs, inputs = (28_672, 4096) if device == "cuda" else (64, 64)
    matrix = torch.randn(outputs, inputs, device=where)
    if form == OUR_INT4:
        weight = quantized.pack(quantize(matrix, 4), where)
    else:
        weight = ops.pack(matrix.to(dtype) if form == "none" else quantize(matrix, {"int8": 8, "int4": 4}[form]))
    x = torch.randn(tokens, inputs, device=where).to(dtype)
    flops = 2.0 * tokens * outputs * inputs
    read = weight.nbytes + tokens * (inputs + outputs) * dtype.itemsize
    name = f"linear, {form if form != 'none' else 'plain'}"
    return kernel_row(device, name, f"{tokens} x {inputs} x {outputs}", lambda: ops.linear(x, weight), read, flops)


def _elementwise(device: DeviceName, tokens: int) -> list[Row]:
    stepper = make_stepper(device)
    ops, where, dtype = stepper.decoder.ops, stepper.decoder.device, stepper.decoder.dtype
    hidden, inner = (4096, 14_336) if device == "cuda" else (64, 64)
    x, delta = torch.randn(2, tokens, hidden, device=where).to(dtype)
    gated = torch.randn(tokens, 2 * inner, device=where).to(dtype)
    norm = Norm(torch.ones(hidden, device=where), None, 1e-5, centered=False)
    rows = (
        ("add and norm", lambda: ops.add_norm(x, delta, 1.0, norm), 4 * x.nbytes),
        ("gated silu", lambda: ops.activate(gated, "silu", True), gated.nbytes * 3 // 2),
    )
    return [kernel_row(device, name, f"{tokens} tokens", work, moved, 0) for name, work, moved in rows]


def compiled() -> list[Row]:
    """What Triton made for this process. Registers that do not fit go to slow memory."""
    functions: dict[str, Any] = {
        name: function
        for module in MODULES
        for name, function in vars(module).items()
        if hasattr(function, "device_caches")
    }
    rows: list[Row] = [
        {"kernel": name, "registers": kernel.n_regs, "spilled": kernel.n_spills, "shared": kernel.metadata.shared}
        for name, function in functions.items()
        for kernels, *_ in function.device_caches.values()
        for kernel in kernels.values()
    ]
    spilled = sorted({str(row["kernel"]) for row in rows if row["spilled"]})
    assert not spilled, f"registers are spilled in {', '.join(spilled)}"
    return rows
