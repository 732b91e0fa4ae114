"""Compiles the CUDA operations' kernels without a GPU: `python -m tests.shard.compiling_process 80 90 adapters`.

The arguments are compute capabilities, times ten, and names of KERNELS, if not all. Operations run on CPU tensors, and
compile each kernel for its arguments instead of launching it. Prints a line of JSON with what each compiled kernel
needs and does, see `describe`, and in how many seconds it was there.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

os.environ["TRITON_INTERPRET"] = "0"

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from loraplex_shard.lora.weights.deltas import Delta, partition_adapter
from loraplex_shard.ops.base import HeadNorms, Norm
from loraplex_shard.ops.cuda.int4 import Int4Weight
from loraplex_shard.ops.cuda.operations import CudaOperations
from loraplex_shard.ops.quantized import FLOAT8, quantize, to_float8
from loraplex_shard.sampling import cuda
from loraplex_shard.sampling.stages import PARAMETERS
from loraplex_shard.shapes.batch import Segment
from loraplex_shard.shapes.heads import Heads
from loraplex_shard.shapes.layout import LinearLayout, LinearPart
from tests.shard.operations import angles, filled_cache, paged_batch, random

CUDA = CudaOperations(torch.device("cpu"))
WIDTH = 1024
INPUTS = 4096  # of adapters: in as many slices as there may be
WIDE = re.compile(r"(?:ld|st)\.global\S*\.v4\.b32|cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10")
TOKENS = 1, 100  # decoding and a prompt use different kernels


class AbsentGpu:
    """Answers what Triton asks its driver before it launches a kernel. Each capability is a separate device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(run: Callable[..., CompiledKernel]) -> Callable[..., CompiledKernel]:
    def compiled(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> CompiledKernel:
        began = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found = {"kernel": self.fn.__name__, "capability": driver.active.capability}
        print(json.dumps(found | {"seconds": time.perf_counter() - began} | describe(kernel)))
        return kernel

    return compiled


def describe(kernel: CompiledKernel) -> dict[str, int]:
    """Its bytes of shared memory; registers and bytes of local memory of a thread, which are spilled registers; the
    number of its instructions that move 16 bytes at once between global memory and a thread or shared memory; and that
    of products of four warps."""
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        used = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    local, stack, registers = (sum(map(int, re.findall(rf"{name}:(\d+)", used))) for name in ("LOCAL", "STACK", "REG"))
    return {
        "shared": kernel.metadata.shared,
        "registers": registers,
        "spilled": local + stack,
        "wide": len(WIDE.findall(ptx)),
        "wgmma": ptx.count("wgmma.mma_async"),
    }


def linears(dtype: torch.dtype) -> None:
    x, weight = random(0, 3, WIDTH, dtype=dtype)[:2], random(1, WIDTH, dtype=dtype)
    CUDA.add_norm(x, x, 1.0, Norm(weight.float(), None, 1e-5, centered=False))
    CUDA.activate(x, "silu", gated=True)
    CUDA.upcast(x, 1.0, 30.0)
    for bits in 8, 4:
        packed = CUDA.pack(quantize(random(1, WIDTH, WIDTH), bits))
        for tokens in (*TOKENS, 40):
            CUDA.linear(random(2, tokens, WIDTH, dtype=dtype), packed, weight)
    values = torch.zeros(WIDTH // 8, WIDTH // 128, 32, 4, dtype=torch.int32)
    packed = Int4Weight(values, torch.zeros(WIDTH // 32, WIDTH, 2, dtype=torch.bfloat16), 32)
    CUDA.linear(random(2, max(TOKENS), WIDTH, dtype=dtype), packed)


def float8(dtype: torch.dtype) -> None:
    CUDA.linear(random(2, 3, WIDTH, dtype=dtype), CUDA.pack(to_float8(random(1, WIDTH, WIDTH))))


def sample() -> None:
    chosen = np.zeros(1, PARAMETERS)
    cuda.draw(random(0, 1, 1 << 17), chosen, np.zeros(1))


def experts(dtype: torch.dtype) -> None:
    matrices = [CUDA.pack(random(expert, WIDTH, WIDTH, dtype=dtype)) for expert in range(2)]
    weight = CUDA.stack(matrices, [None, None])
    for tokens in TOKENS:
        routing = CUDA.route(random(0, tokens, 2), 1, normalized=True)
        CUDA.expert_linear(CUDA.dispatch(random(1, tokens, WIDTH, dtype=dtype), routing), routing, weight)


def adapters(dtype: torch.dtype, form: torch.dtype) -> None:
    parts = (LinearPart("p", WIDTH, (slice(0, WIDTH),)),)
    layout = LinearLayout("fused", 0, parts, INPUTS, slice(0, INPUTS))
    delta = Delta(random(0, 16, INPUTS), random(0, WIDTH, 16), 1.0)
    adapter = partition_adapter({"p": delta}, [layout], form).weights
    for tokens in TOKENS:
        x, out = random(0, tokens, INPUTS, dtype=dtype), random(0, tokens, WIDTH, dtype=dtype)
        CUDA.add_lora_delta(out, x, (Segment(0, tokens, adapter),), layout)


def attend(dtype: torch.dtype, form: torch.dtype, heads: Heads, norm: bool) -> None:
    batch, num_blocks = paged_batch([(600, 1), (30, 100)], 0)
    (layer,) = filled_cache(num_blocks, heads, form, 0, positions_first=True).layers
    qkv, step = random(0, 101, heads.width, dtype=dtype), CUDA.prepare(batch)
    norms = HeadNorms(random(1, heads.query + heads.kv, heads.dim), 1e-6) if norm else None
    CUDA.rotate_and_write(qkv, heads, norms, angles(700, heads.dim), step, layer)
    CUDA.attention(qkv, heads, step, layer, random(2, heads.query) if norm else None)


HALF = torch.bfloat16
KERNELS: dict[str, Callable[[], None]] = {
    "linears": partial(linears, HALF),
    "sampling": sample,
    "float8": partial(float8, HALF),
    "experts": partial(experts, HALF),
    "adapters": partial(adapters, HALF, HALF),
    "adapters, int8": partial(adapters, HALF, torch.int8),
    "attention, int8": partial(attend, HALF, torch.int8, Heads(query=9, kv=3, dim=128, window=100), norm=True),
    "attention, float8": partial(attend, HALF, FLOAT8, Heads(query=32, kv=8, dim=128), norm=False),
    "attention, wide": partial(attend, HALF, HALF, Heads(query=8, kv=1, dim=256, soft_cap=30.0), norm=False),
    "attention, float32": partial(attend, torch.float32, torch.float32, Heads(query=8, kv=2, dim=256), norm=False),
}
SINCE = {"float8": 89, "attention, float8": 89}  # the first capability that has it, if not all do

if __name__ == "__main__":
    JITFunction.run = compile_only(JITFunction.run)
    names = [argument for argument in sys.argv[1:] if not argument.isdigit()] or list(KERNELS)
    for capability in (int(argument) for argument in sys.argv[1:] if argument.isdigit()):
        driver.set_active(AbsentGpu(capability))
        for name in names:
            if capability >= SINCE.get(name, 0):
                KERNELS[name]()
