"""Operations on each token by itself: the norm of a sum, with one program per token, the activation, and logits."""

import torch
import triton
import triton.language as tl

from loraplex_shard.ops.base import Activation, Norm

LANES = 1024  # values per program


def add_norm(hidden: torch.Tensor, delta: torch.Tensor | None, scale: float, norm: Norm) -> torch.Tensor:
    """Implements Operations.add_norm or, without a delta, Operations.norm."""
    tokens, n = hidden.shape
    out = torch.empty_like(hidden)
    lanes = triton.next_power_of_2(n)
    warps = max(4, min(16, lanes // 512))  # 16 values per thread; more than 64 would not fit into its registers
    _add_norm[(tokens,)](
        hidden,
        delta,
        scale,
        norm.weight,
        norm.bias,
        out,
        norm.eps,
        CENTERED=norm.centered,
        N=n,
        LANES=lanes,
        num_warps=warps,
    )
    return out


def activate(x: torch.Tensor, function: Activation, gated: bool) -> torch.Tensor:
    """Implements Operations.activate."""
    tokens, n = x.shape[0], x.shape[1] // (2 if gated else 1)
    out = x.new_empty((tokens, n))
    _activate[(tokens, triton.cdiv(n, LANES))](x, out, FUNCTION=function, GATED=gated, N=n, LANES=LANES)
    return out


def upcast(x: torch.Tensor, scale: float, soft_cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Implements Operations.upcast. The numbers are read once."""
    rows, n = x.shape
    wide = torch.empty((rows, n), dtype=torch.float32, device=x.device)
    finite = torch.empty((rows, triton.cdiv(n, LANES)), dtype=torch.bool, device=x.device)
    _upcast[finite.shape](x, wide, finite, scale, N=n, SOFT_CAP=soft_cap, LANES=LANES)
    return wide, finite.all(1)


@triton.jit
def _add_norm(
    hidden, delta, scale, weight, bias, out, eps, CENTERED: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr
):
    lanes = tl.arange(0, LANES)
    within = lanes < N
    place = tl.program_id(0).to(tl.int64) * N + lanes
    dtype = hidden.dtype.element_ty
    total = tl.load(hidden + place, within, 0.0).to(tl.float32)
    if delta is not None:
        added = (total + scale * tl.load(delta + place, within, 0.0).to(tl.float32)).to(dtype)
        tl.store(hidden + place, added, within)
        total = added.to(tl.float32)
    if CENTERED:
        total = tl.where(within, total - tl.sum(total, 0) / N, 0.0)
    normed = total * tl.rsqrt(tl.sum(total * total, 0) / N + eps) * tl.load(weight + lanes, within, 0.0)
    if bias is not None:
        normed += tl.load(bias + lanes, within, 0.0)
    tl.store(out + place, normed.to(dtype), within)


@triton.jit
def _activate(x, out, FUNCTION: tl.constexpr, GATED: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * LANES + tl.arange(0, LANES)
    within = lanes < N
    place = x + token * (2 * N if GATED else N) + lanes
    value = tl.load(place, within, 0.0).to(tl.float32)
    if FUNCTION == "silu":
        value = value * tl.sigmoid(value)
    elif FUNCTION == "gelu":
        value = 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":
        inner = 1.5957691216057308 * (value + 0.044715 * value * value * value)
        value = value * tl.sigmoid(tl.maximum(inner, -80.0))
    elif FUNCTION == "quick_gelu":
        value = value * tl.sigmoid(1.702 * value)
    elif FUNCTION == "clamped_swiglu":
        value = tl.minimum(value, 7.0, tl.PropagateNan.ALL)
        value = value * tl.sigmoid(1.702 * value)
    elif FUNCTION == "relu":
        value = tl.maximum(value, 0.0, tl.PropagateNan.ALL)
    else:
        tl.static_assert(FUNCTION == "relu2")
        value = tl.maximum(value, 0.0, tl.PropagateNan.ALL)
        value = value * value
    if GATED:
        up = tl.load(place + N, within, 0.0).to(tl.float32)
        if FUNCTION == "clamped_swiglu":
            up = tl.clamp(up, -7.0, 7.0, tl.PropagateNan.ALL) + 1
        value *= up
    tl.store(out + token * N + lanes, value.to(out.dtype.element_ty), within)


@triton.jit
def _upcast(x, wide, finite, scale, N: tl.constexpr, SOFT_CAP: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * LANES + tl.arange(0, LANES)
    within = lanes < N
    value = tl.load(x + row * N + lanes, within, 0.0).to(tl.float32) * scale
    all_finite = tl.max((~(tl.abs(value) < float("inf"))).to(tl.int32), 0) == 0
    tl.store(finite + row * tl.num_programs(1) + tl.program_id(1), all_finite)
    if SOFT_CAP > 0:
        value = SOFT_CAP * (2 * tl.sigmoid(2 / SOFT_CAP * value) - 1)  # tanh
    tl.store(wide + row * N + lanes, value, within)
