"""What an adapter does to a module's output besides adding a product of two matrices: biases of B (lora_bias), DoRA's
magnitudes, and tensors that replace the base's (modules_to_save, bias, base_layer)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.tensor_names import PREFIX
from loraplex_shard.lora.sources.files import TENSORS
from loraplex_shard.lora.weights.deltas import Delta

ROWS_AT_A_TIME = 4096


def name_of_bias(module: str) -> str:
    """PEFT's name for the bias of B in an adapter's file."""
    return f"{PREFIX}{module}.lora_B.bias"


def name_of_magnitude(module: str) -> str:
    """PEFT's name for the lengths that DoRA gives to the rows of a matrix (arXiv 2402.09353)."""
    return f"{PREFIX}{module}.lora_magnitude_vector"


def name_of_factors(module: str) -> str:
    """The name of the factors for a module's outputs, which is (IA)3's name for them."""
    return f"{PREFIX}{module}.ia3_l"


@dataclass(frozen=True, slots=True)
class Replaced:
    """The tensors that replace a module's own."""

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def with_outputs(
    module: str, delta: Delta, tensors: Mapping[str, torch.Tensor], own: Replaced, base: BaseModel
) -> Delta:
    """Returns the delta with everything that the adapter's tensors do to the module's output. They have been
    checked."""
    if delta.a.is_meta:
        return delta
    b_bias, magnitude = tensors.get(name_of_bias(module)), tensors.get(name_of_magnitude(module))
    factors = tensors.get(name_of_factors(module))
    if factors is not None:
        if own != Replaced():
            raise AdapterInvalidError(f"{TENSORS}: {PREFIX}{module}: (IA)3 of a matrix of its own is not served")
        return replace(delta, gain=factors)
    if b_bias is None and magnitude is None and own == Replaced():
        return delta
    given = {name_of_bias(module): b_bias, name_of_magnitude(module): magnitude, f"{module}.bias": own.bias}
    for name, tensor in given.items():
        if tensor is not None and not tensor.isfinite().all():
            raise AdapterInvalidError(f"{TENSORS}: {name} has values that are NaN or infinite")
    old = base.bias(module)
    shift = _zeros(delta) if old is None else old.float()
    gain: torch.Tensor | None = None
    whole = None if own.weight is None else own.weight.float()
    if magnitude is not None:
        gain = magnitude.float() / _lengths(module, delta, whole, base)
        delta = replace(delta, b=delta.b.float() * gain[:, None])
        whole = None if whole is None else whole * gain[:, None]
    if whole is not None:
        gain = _zeros(delta)
    # The base's output contains the base's bias, to which DoRA's lengths do not apply.
    left = shift if gain is None else shift * gain
    shift = (shift if own.bias is None else own.bias.float()) - left
    if b_bias is not None:
        shift = shift + b_bias.float() * delta.scale
    return replace(delta, gain=gain, shift=shift if shift.any() else None, whole=whole)


def nothing(out_features: int, in_features: int) -> Delta:
    """The delta of a module without A and B."""
    return Delta(torch.zeros(0, in_features), torch.zeros(out_features, 0), 1.0)


def _zeros(delta: Delta) -> torch.Tensor:
    return torch.zeros(len(delta.b))


def _lengths(module: str, delta: Delta, whole: torch.Tensor | None, base: BaseModel) -> torch.Tensor:
    """The lengths of the rows of the base's matrix plus the delta's. The base's matrix is taken as it is served, which
    may be rounded."""
    if whole is not None:
        read = whole.__getitem__
    elif base.matrices is not None and base.matrices.has(module):
        read = partial(base.matrices.read, module)
    else:
        raise AdapterInvalidError(f"{TENSORS}: {name_of_magnitude(module)}: DoRA of this kind of layer is not served")
    a, b, lengths = delta.a.float(), delta.b.float() * delta.scale, []
    for start in range(0, len(b), ROWS_AT_A_TIME):
        rows = slice(start, min(start + ROWS_AT_A_TIME, len(b)))
        matrix = read(rows)
        lengths.append(torch.addmm(matrix, b[rows], a).norm(dim=1))
    return torch.cat(lengths)
