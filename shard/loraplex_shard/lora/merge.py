"""Merges several adapters into one, with the results of PEFT's `add_weighted_adapter`. Knows nothing about files, ranks
or dtypes.

A and B of a module are merged separately, each with the square root of the adapter's weight times its scale. The merged
adapter's own scale is 1. (If the first adapter is rank-stabilized, PEFT multiplies by the root of lora_rank once more,
although the merged A and B already have the scales in them. That is not done here.)
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_shard.lora.weights.deltas import Delta


@dataclass(frozen=True, slots=True)
class Recipe:
    """How adapters are merged. The router has checked the values."""

    weights: tuple[float, ...]  # one per adapter
    strategy: str  # a key of STRATEGIES
    density: float  # the fraction of values of A and of B that pruning keeps; in (0, 1]
    majority_sign_method: str  # "total" or "frequency"


def merge(adapters: Sequence[Mapping[str, Delta]], recipe: Recipe) -> dict[str, Delta]:
    """Returns the merged adapter. A module that only some of the adapters have is merged from these.

    Raises InvalidRequestError if a module's lora_rank is not the same in all of them.
    """
    modules = dict.fromkeys(module for adapter in adapters for module in adapter)
    strategy = recipe.strategy if len(adapters) > 1 else "linear"
    return {module: _merge_module(module, adapters, recipe, strategy) for module in modules}


def _merge_module(module: str, adapters: Sequence[Mapping[str, Delta]], recipe: Recipe, strategy: str) -> Delta:
    found = [(a[module], weight) for a, weight in zip(adapters, recipe.weights, strict=True) if module in a]
    if strategy == "linear" and all(delta.is_gain for delta, _ in found):  # as PEFT merges (IA)3
        gains = [weight * delta.gain.float() for delta, weight in found if delta.gain is not None]
        return replace(found[0][0], gain=torch.stack(gains).sum(0))
    if not all(delta.is_plain for delta, _ in found):
        raise InvalidRequestError(
            FieldViolation(
                "merged_adapters.adapters",
                f"{module}: adapters with DoRA, biases or whole matrices cannot be merged: PEFT would drop those; and"
                " those of (IA)3 by the strategy linear and with each other alone",
            )
        )
    _check_lora_ranks(module, {delta.lora_rank for delta, _ in found})
    factors = [weight * delta.scale for delta, weight in found]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    # Only A gets the sign: if both had it, it would cancel.
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    prune, combine = STRATEGIES[strategy]
    a = [prune(delta.a.float(), recipe.density) for delta, _ in found]
    b = [prune(delta.b.float(), recipe.density) for delta, _ in found]
    return Delta(combine(a, signed, recipe), combine(b, roots, recipe), scale=1.0)


def _check_lora_ranks(module: str, lora_ranks: Iterable[int]) -> None:
    different = sorted(lora_ranks)
    if len(different) > 1:
        raise InvalidRequestError(
            FieldViolation(
                "merged_adapters.adapters",
                f"the lora_rank of {module} is {' and '.join(map(str, different))}: only adapters of the same"
                " lora_rank can be merged",
            )
        )


# ---- pruning: tensor [m, n], density -> the tensor with some values set to 0 -----------------------------------------


def keep_all(tensor: Tensor, density: float) -> Tensor:
    return tensor


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Keeps the fraction `density` of the values with the largest magnitudes."""
    if density >= 1:
        return tensor
    flat = tensor.flatten()
    largest = flat.abs().topk(int(density * len(flat))).indices
    return torch.zeros_like(flat).scatter(0, largest, flat[largest]).view_as(tensor)


def keep_random(tensor: Tensor, density: float) -> Tensor:
    """Keeps each value with probability `density`, divided by it (arXiv 2311.03099).

    The choice depends only on the tensor's content, so all ranks, and all merges of the same adapter, keep the same
    values.
    """
    if density >= 1:
        return tensor
    content = hashlib.sha256(tensor.contiguous().numpy().data).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(content[:8], "little"))
    kept = torch.rand(tensor.shape, generator=generator) < density
    return tensor * kept / density


# ---- combining: tensors [m, n] and a factor for each -> one tensor ---------------------------------------------------


def add(tensors: Sequence[Tensor], factors: Sequence[float], recipe: Recipe) -> Tensor:
    return _weighted(torch.stack(list(tensors)), factors).sum(0)


def add_agreeing(tensors: Sequence[Tensor], factors: Sequence[float], recipe: Recipe) -> Tensor:
    """Elects a sign for each value and takes the mean of those that have it (TIES, arXiv 2306.01708)."""
    stacked = torch.stack(list(tensors))
    votes = stacked if recipe.majority_sign_method == "total" else stacked.sign()
    elected = torch.where(votes.sum(0) >= 0, 1, -1)
    agreeing = stacked.sign() == elected
    return (_weighted(stacked, factors) * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def _weighted(stacked: Tensor, factors: Sequence[float]) -> Tensor:
    return stacked * torch.tensor(factors)[:, None, None]


Prune = Callable[[Tensor, float], Tensor]
Combine = Callable[[Sequence[Tensor], Sequence[float], Recipe], Tensor]

STRATEGIES: dict[str, tuple[Prune, Combine]] = {
    "linear": (keep_all, add),
    "magnitude_prune": (keep_largest, add),
    "ties": (keep_largest, add_agreeing),
    "dare_linear": (keep_random, add),
    "dare_ties": (keep_random, add_agreeing),
}
