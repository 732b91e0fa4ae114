"""The gated activation of the MLP: SwiGLU without its projections (arXiv 2002.05202)."""

import torch
import torch.nn.functional as F


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, for gate_up [tokens, 2 * n] that holds the two side by side: [tokens, n]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
