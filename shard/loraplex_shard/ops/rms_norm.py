"""Root mean square layer normalization (arXiv 1910.07467)."""

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n] over the root of its last dimension's mean square, times weight [n] or [..., n].

    Computed in float32, whatever the dtype of x.
    """
    if weight.dim() == 1:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return F.rms_norm(x, (x.shape[-1],), eps=eps).mul_(weight)
