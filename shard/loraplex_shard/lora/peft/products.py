"""Converts PEFT's other kinds of adapters to an A and a B for each module, with exactly the same product, or to a
factor for each output. All later code only knows LoRA.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.config import MAX_LORA_RANK, AdapterConfig, BlockDiagonal
from loraplex_shard.lora.peft.ia3 import as_output_factors, gated_mlps
from loraplex_shard.lora.peft.kinds import (
    TO_LORA,
    AdaLoraConfig,
    Ia3Config,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    VeraConfig,
)
from loraplex_shard.lora.peft.taken import Taken
from loraplex_shard.lora.peft.targets import Target
from loraplex_shard.lora.peft.tensor_names import PREFIX
from loraplex_shard.lora.sources.files import TENSORS
from loraplex_shard.lora.weights.deltas import name_of_a, name_of_b
from loraplex_shard.shapes.layout import LinearLayout, LinearPart

Factors = tuple[torch.Tensor, torch.Tensor]  # A [lora_rank, in_features] and B [out_features, lora_rank]


@dataclass(frozen=True, slots=True)
class Module:
    """A targeted module."""

    name: str
    in_features: int
    out_features: int
    lora_rank: int  # from the configuration


def in_plain_terms(
    config: AdapterConfig,
    tensors: Mapping[str, torch.Tensor],
    targets: Mapping[str, Target],
    parts: Mapping[str, tuple[LinearLayout, LinearPart]],
    base: BaseModel,
    limit: int = sys.maxsize,
) -> tuple[dict[str, torch.Tensor], dict[str, Target]]:
    """Replaces the tensors of other kinds by those of LoRA or by factors for outputs. Returns all tensors by PEFT's
    names, and the targets with the resulting lora_ranks. `parts` are all modules of the base.

    Raises AdapterInvalidError, naming the tensor, if one is missing, has a wrong shape or is not finite, or if A and B
    take more than `limit` bytes: a small file can mean large ones.
    """
    shapes = {module: (layout.in_features, part.out_features) for module, (layout, part) in parts.items()}
    if isinstance(config, Ia3Config):
        gated = gated_mlps([layout for layout, _ in parts.values()]) if base.served is not None else {}
        return as_output_factors(config, tensors, targets, shapes, gated)
    if isinstance(config, VeraConfig) and not config.save_projection and base.is_text_part:
        raise AdapterInvalidError(
            "adapter_config.json: save_projection: what all modules share depends on the sizes of the part that reads"
            " pictures, too, which is not served: save the adapter with save_projection=True"
        )
    return as_lora(config, tensors, targets, shapes, limit)


def most_bytes(config: AdapterConfig, layouts: Sequence[LinearLayout]) -> int:
    """The most that as_lora makes of a file; 0 if the file has A and B itself."""
    lora_rank = max(config.r, *(config.rank_pattern or {}).values(), 0)
    match config:
        case LoHaConfig():
            lora_rank = lora_rank**2
        case LoKrConfig():
            lora_rank = MAX_LORA_RANK
        case VeraConfig() | MissConfig() | AdapterConfig(use_bdlora=BlockDiagonal()) | AdapterConfig(use_qalora=True):
            pass
        case _:
            return 0
    sides = sum(layout.in_features + part.out_features for layout in layouts for part in layout.parts)
    return min(lora_rank, MAX_LORA_RANK) * sides * torch.float32.itemsize


def as_lora(
    config: AdapterConfig,
    tensors: Mapping[str, torch.Tensor],
    targets: Mapping[str, Target],
    shapes: Mapping[str, tuple[int, int]],
    limit: int = sys.maxsize,
) -> tuple[dict[str, torch.Tensor], dict[str, Target]]:
    """Does this for all kinds whose modules get an A and a B. `shapes` has in_features and out_features."""
    taken = Taken(tensors)
    factors = _factors(config, taken, [shapes[module] for module in targets])
    if factors is None:
        return taken.left, dict(targets)
    found, size = {}, 0
    for name, target in targets.items():
        a, b = factors(Module(name, *shapes[name], target.lora_rank))
        size += a.nbytes + b.nbytes
        if size > limit:
            raise AdapterInvalidError(
                f"{TENSORS}: as LoRA the adapter takes more than {limit:,} bytes, which is all that adapters may take"
                f" together: give the shards more memory, or {TO_LORA}"
            )
        taken.left |= {name_of_a(name): a, name_of_b(name): b}
        found[name] = Target(len(a), target.scale)
    for shared in "base_model.vera_A", "base_model.vera_B":
        if isinstance(config, VeraConfig) and config.save_projection:
            del taken.left[PREFIX + shared]
    return taken.left, found


def _factors(config: AdapterConfig, taken: Taken, shapes: list[tuple[int, int]]) -> Callable[[Module], Factors] | None:
    """The function that computes a module's A and B. None: they are in the file."""
    match config:
        case AdaLoraConfig():
            return lambda module: _with_diagonal(taken, module)
        case LoHaConfig():
            return lambda module: _hadamard(taken, module)
        case LoKrConfig():
            return lambda module: _kronecker(taken, module)
        case VeraConfig():
            a, b = _projections(config, taken, shapes)
            return lambda module: _between_vectors(taken, module, a, b)
        case MissConfig():
            return lambda module: _summed(taken, module, config.init_weights == "mini")
        case AdapterConfig(use_bdlora=BlockDiagonal() as blocks):
            return lambda module: _of_blocks(taken, module, blocks)
        case AdapterConfig(use_qalora=True, qalora_group_size=int(size)):
            return lambda module: _of_groups(taken, module, size)
    return None


def _with_diagonal(taken: Taken, module: Module) -> Factors:
    a = taken.take(f"{module.name}.lora_A", module.lora_rank, module.in_features)
    diagonal = taken.take(f"{module.name}.lora_E", module.lora_rank, 1)
    return a * diagonal, taken.take(f"{module.name}.lora_B", module.out_features, module.lora_rank)


def _hadamard(taken: Taken, module: Module) -> Factors:
    """The elementwise product (B A) * (D C) as a product of two matrices: their columns and rows are elementwise
    products of columns of B and D, and of rows of A and C."""
    r, name = module.lora_rank, f"{module.name}.hada_w"
    _check_rank(module, r * r)
    b, a = taken.take(f"{name}1_a", module.out_features, r), taken.take(f"{name}1_b", r, module.in_features)
    d, c = taken.take(f"{name}2_a", module.out_features, r), taken.take(f"{name}2_b", r, module.in_features)
    return (a[:, None] * c[None]).flatten(0, 1), (b[:, :, None] * d[:, None]).flatten(1)


def _kronecker(taken: Taken, module: Module) -> Factors:
    """(B A) x (D C) = (B x D)(A x C)"""
    a, b = _product(taken, f"{module.name}.lokr_w1", module.lora_rank)
    c, d = _product(taken, f"{module.name}.lokr_w2", module.lora_rank)
    inputs, outputs = a.shape[1] * c.shape[1], b.shape[0] * d.shape[0]
    if (inputs, outputs) != (module.in_features, module.out_features):
        raise AdapterInvalidError(
            f"{TENSORS}: {PREFIX}{module.name}.lokr_w1 and lokr_w2 make [{outputs}, {inputs}], not"
            f" [{module.out_features}, {module.in_features}]: the adapter was made for another base"
        )
    _check_rank(module, len(a) * len(c))
    return torch.kron(a, c), torch.kron(b, d)


def _check_rank(module: Module, lora_rank: int) -> None:
    if lora_rank > MAX_LORA_RANK:
        raise AdapterInvalidError(
            f"{TENSORS}: {PREFIX}{module.name}: as LoRA it has lora_rank {lora_rank}, but at most {MAX_LORA_RANK} is"
            f" served: {TO_LORA}"
        )


def _product(taken: Taken, name: str, lora_rank: int) -> Factors:
    """Returns a matrix that is stored whole or as a product."""
    if not taken.has(name):
        b = taken.take(f"{name}_a", None, lora_rank)
        return taken.take(f"{name}_b", lora_rank, None), b
    matrix = taken.take(name, None, None)
    rows, columns = matrix.shape
    return (torch.eye(columns), matrix) if columns <= rows else (matrix, torch.eye(rows))


def _projections(config: VeraConfig, taken: Taken, shapes: list[tuple[int, int]]) -> Factors:
    """The matrices that all modules share. They are as large as the largest module needs."""
    if config.save_projection:
        return (
            taken.take("base_model.vera_A", config.r, None, shared=True),
            taken.take("base_model.vera_B", None, config.r, shared=True),
        )
    inputs, outputs = (max(sizes) for sizes in zip(*shapes, strict=True))
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    a, b = torch.empty(config.r, inputs), torch.empty(outputs, config.r)
    for matrix in a, b:  # in this order and with He's initialization, as in PEFT
        bound = (6 / matrix.shape[1]) ** 0.5
        matrix.uniform_(-bound, bound, generator=generator)
    return a, b


def _between_vectors(taken: Taken, module: Module, a: torch.Tensor, b: torch.Tensor) -> Factors:
    if a.shape[1] < module.in_features or b.shape[0] < module.out_features:
        raise AdapterInvalidError(
            f"{TENSORS}: base_model.vera_A {list(a.shape)} and base_model.vera_B {list(b.shape)} are too small for"
            f" {module.name}: the adapter was made for another base"
        )
    inner = taken.take(f"{module.name}.vera_lambda_d", module.lora_rank)
    outer = taken.take(f"{module.name}.vera_lambda_b", module.out_features)
    return a[:, : module.in_features] * inner[:, None], b[: module.out_features] * outer[:, None]


def _summed(taken: Taken, module: Module, repeated: bool) -> Factors:
    """Inputs whose indices have the same remainder are summed."""
    lora_rank, outputs = module.lora_rank, module.out_features
    block = taken.take(f"{module.name}.miss_block", lora_rank, None if repeated else outputs)
    if outputs % max(block.shape[1], 1):
        raise AdapterInvalidError(
            f"{TENSORS}: {PREFIX}{module.name}.miss_block {list(block.shape)} does not divide {outputs} outputs"
        )
    b = block.repeat(1, outputs // max(block.shape[1], 1)).T
    places = torch.arange(module.in_features)
    a = torch.zeros(lora_rank, module.in_features).index_put_((places % lora_rank, places), torch.tensor(1.0))
    return a, b


def _of_blocks(taken: Taken, module: Module, config: BlockDiagonal) -> Factors:
    own, count = module.name.rpartition(".")[2], config.nblocks
    a_is, b_is = (
        any(part in own for part in parts or ()) for parts in (config.target_modules_bd_a, config.target_modules_bd_b)
    )
    if (a_is and b_is) or (config.match_strict and not (a_is or b_is)):
        raise AdapterInvalidError(f"adapter_config.json: use_bdlora names {own} {'twice' if a_is else 'nowhere'}")
    columns, lora_rank = (module.in_features // count if a_is else module.in_features), module.lora_rank
    a = taken.take(f"{module.name}.lora_A.weight", lora_rank, columns)
    b = taken.take(f"{module.name}.lora_B.weight", module.out_features, lora_rank // count if b_is else lora_rank)
    return (_diagonal(a, count) if a_is else a), (_diagonal(b, count) if b_is else b)


def _diagonal(stacked: torch.Tensor, count: int) -> torch.Tensor:
    whole: torch.Tensor = torch.block_diag(*stacked.chunk(count))  # type: ignore[no-untyped-call]
    return whole


def _of_groups(taken: Taken, module: Module, group_size: int) -> Factors:
    """Each column of A is for the mean of a group of inputs, times the number of groups. It is repeated for each
    input."""
    groups, rest = divmod(module.in_features, group_size)
    if rest:
        raise AdapterInvalidError(
            f"adapter_config.json: use_qalora: qalora_group_size {group_size} does not divide the {module.in_features}"
            f" inputs of {module.name}"
        )
    a = taken.take(f"{module.name}.lora_A.weight", module.lora_rank, groups)
    b = taken.take(f"{module.name}.lora_B.weight", module.out_features, module.lora_rank)
    return a.repeat_interleave(group_size, dim=1) * (groups / group_size), b
