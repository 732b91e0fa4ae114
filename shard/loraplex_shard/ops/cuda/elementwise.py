"""What is done to each token by itself: the norm of a sum, and the gated activation. One program per token."""

import torch
import triton
import triton.language as tl

LANES = 1024  # values of the gated activation that one program computes


def add_rms_norm(hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As Operations.add_rms_norm says."""
    tokens, n = hidden.shape
    out = torch.empty_like(hidden)
    lanes = triton.next_power_of_2(n)
    warps = max(4, min(16, lanes // 512))  # a thread holds sixteen values: its registers bear no more than 64
    _add_rms_norm[(tokens,)](hidden, delta, weight, out, eps, N=n, LANES=lanes, num_warps=warps)
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As Operations.silu_mul says."""
    tokens, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((tokens, n))
    _silu_mul[(tokens, triton.cdiv(n, LANES))](gate_up, out, N=n, LANES=LANES)
    return out


@triton.jit
def _add_rms_norm(hidden, delta, weight, out, eps, N: tl.constexpr, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    within = lanes < N
    place = tl.program_id(0).to(tl.int64) * N + lanes
    dtype = hidden.dtype.element_ty
    total = tl.load(hidden + place, within, 0.0).to(tl.float32) + tl.load(delta + place, within, 0.0).to(tl.float32)
    total = total.to(dtype)
    tl.store(hidden + place, total, within)
    total = total.to(tl.float32)
    normed = total * tl.rsqrt(tl.sum(total * total, 0) / N + eps)
    tl.store(out + place, (normed * tl.load(weight + lanes, within, 0.0).to(tl.float32)).to(dtype), within)


@triton.jit
def _silu_mul(gate_up, out, N: tl.constexpr, LANES: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * LANES + tl.arange(0, LANES)
    within = lanes < N
    gate = tl.load(gate_up + token * 2 * N + lanes, within, 0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * N + N + lanes, within, 0.0).to(tl.float32)
    tl.store(out + token * N + lanes, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), within)
