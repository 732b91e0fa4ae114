"""Compiles the CUDA operations' kernels without a GPU: `python -m tests.shard.compiling_process 80 90`.

The arguments are compute capabilities, times ten. Operations run on CPU tensors, and compile each kernel for its
arguments instead of launching it. Prints a line of JSON with what each compiled kernel needs and does: see `describe`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

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
from loraplex_shard.ops.cuda.operations import CudaOperations
from loraplex_shard.ops.quantized import quantize, to_float8
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
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        print(json.dumps({"kernel": self.fn.__name__, "capability": driver.active.capability, **describe(kernel)}))
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


if __name__ == "__main__":
    JITFunction.run = compile_only(JITFunction.run)
    half = torch.bfloat16
    for capability in map(int, sys.argv[1:]):
        driver.set_active(AbsentGpu(capability))
        linears(half)
        sample()
        if capability >= 89:
            float8(half)
        experts(half)
        adapters(half, half)
        adapters(half, torch.int8)
        attend(half, torch.int8, Heads(query=9, kv=3, dim=128, window=100), norm=True)
        attend(half, half, Heads(query=8, kv=1, dim=256, soft_cap=30.0), norm=False)
    attend(torch.float32, torch.float32, Heads(query=8, kv=2, dim=256), norm=False)
