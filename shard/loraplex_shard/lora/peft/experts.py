"""Adapters of experts: converts all layouts that trainers write to an A and a B for each expert's modules. The layouts:

- by expert, as in the base's own file: `mlp.experts.3.gate_proj.lora_A.weight`;
- for a parameter that holds all experts (PEFT's target_parameters): the experts' A [lora_rank, in] one below the other,
  and a B [out, lora_rank * experts], whose columns are all experts' first ranks, then all experts' second ranks, and so
  on. If `mlp.experts` has the tensors of down_proj, `mlp.experts.base_layer` has those of gate_up_proj;
- with a dimension for experts, as SGLang serves them: `mlp.experts.w1.lora_A.weight` [experts, lora_rank, in], or
  [1, lora_rank, in] if all experts share it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.sources.files import TENSORS
from loraplex_shard.lora.weights.deltas import name_of_a, name_of_b
from loraplex_shard.shapes.layout import LinearLayout

Tensors = Mapping[str, torch.Tensor]

_OF_EXPERT = re.compile(r"(?P<experts>.+)\.\d+\.(?P<leaf>\w+)")
# Trainers' names for an expert's modules that mean the same.
_ALIASES = ({"w1", "gate_proj"}, {"w3", "up_proj"}, {"w2", "down_proj"})
# Some modules have another name in transformers than in files.
_BLOCK, _RENAMED = ".block_sparse_moe.", ".mlp."


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter that holds the matrices of all experts, or the router's matrix."""

    names: tuple[str, ...]  # its possible names, such as model.layers.3.mlp.experts.gate_up_proj
    layouts: tuple[LinearLayout, ...]  # one for each expert

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(part.module for layout in self.layouts for part in layout.parts)


def find_parameters(layouts: Sequence[LinearLayout]) -> tuple[Parameter, ...]:
    """The parameters that target_parameters may name."""
    found: dict[str, list[LinearLayout]] = {}
    for layout in layouts:
        module = layout.parts[0].module
        if match := layout.of_expert and _OF_EXPERT.fullmatch(module):
            down = len(layout.parts) == 1 and match["leaf"] in ("w2", "down_proj")
            found.setdefault(f"{match['experts']}.{'down_proj' if down else 'gate_up_proj'}", []).append(layout)
        elif layout.name.endswith(".router"):
            found[f"{module}.weight"] = [layout]
    return tuple(Parameter(tuple(_spellings(name)), tuple(own)) for name, own in found.items())


def by_expert(
    tensors: Tensors, parameters: Sequence[Parameter], targeted: Iterable[Parameter]
) -> dict[str, torch.Tensor]:
    """The tensors by PEFT's names. Tensors of all experts are replaced by an A and a B for each expert's modules.

    `targeted` are the parameters that target_parameters names. Raises AdapterInvalidError, naming the tensor, for one
    whose shape does not fit the number of experts.
    """
    left, own = dict(tensors), tuple(targeted)
    for parameter in own:
        names = _names_in_file(parameter, own, left)
        if names is not None:
            a, b = (left.pop(name) for name in names)
            left |= _split(parameter, *_natural(parameter, *_unrolled(parameter, names, a, b)))
    for parameter in parameters:
        for name in parameter.names:
            left = _expanded(parameter, name, left)
        left = _renamed(parameter, left)
    return left


def absent(parameters: Sequence[Parameter], tensors: Tensors) -> set[str]:
    """The modules of parameters for which the file has no tensors at all. They may be missing although target_modules
    asks for them: in some versions of transformers, a name such as gate_proj stands for modules of experts, in others
    only for those of a shared expert."""
    return {
        module
        for parameter in parameters
        if not any(name_of_a(each) in tensors or name_of_b(each) in tensors for each in parameter.modules)
        for module in parameter.modules
    }


def _spellings(name: str) -> list[str]:
    """The name in the base's file, and the names of the module in transformers."""
    others = name.replace(_BLOCK, _RENAMED), name.replace(".router.layer", ".router")
    return [name, *(other for other in others if other != name)]


def _names_in_file(parameter: Parameter, targeted: Sequence[Parameter], tensors: Tensors) -> tuple[str, str] | None:
    """The names of a parameter's A and B in the adapter's file. PEFT wraps a module once for each of its parameters,
    and the first one is innermost."""
    for name in parameter.names:
        module, _, last = name.rpartition(".")
        if last == "gate_up_proj" and any(f"{module}.down_proj" in other.names for other in targeted):
            module += ".base_layer"
        if name_of_a(module) in tensors and name_of_b(module) in tensors:
            return name_of_a(module), name_of_b(module)
    return None


def _unrolled(
    parameter: Parameter, names: tuple[str, str], a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A as [experts, lora_rank, in] and B as [experts, out, lora_rank]."""
    experts = len(parameter.layouts)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] % experts:
        raise AdapterInvalidError(
            f"{TENSORS}: {names[0]} {list(a.shape)} and {names[1]} {list(b.shape)} are not those of {experts} experts"
        )
    return a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)


def _natural(parameter: Parameter, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Swaps A and B if the adapter was written by an older version of PEFT, which always took a parameter's rows for
    its inputs, so that A may be for the outputs. Square matrices are read as newer versions write them."""
    layout = parameter.layouts[0]
    swapped = (a.shape[2], b.shape[1]) == (sum(part.out_features for part in layout.parts), layout.in_features)
    if swapped and a.shape[2] != b.shape[1]:
        return b.transpose(1, 2), a.transpose(1, 2)
    return a, b


def _split(parameter: Parameter, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    """Splits A [experts or 1, lora_rank, in] and B [experts or 1, out, lora_rank] by expert and part, under PEFT's
    names.
    """
    found = {}
    for number, layout in enumerate(parameter.layouts):
        own_a, own_b = (each[number if len(each) > 1 else 0] for each in (a, b))
        start = 0
        for part in layout.parts:
            found[name_of_a(part.module)] = own_a
            found[name_of_b(part.module)] = own_b[start : start + part.out_features]
            start += part.out_features
    return found


def _expanded(parameter: Parameter, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replaces tensors of three dimensions, below the name of the experts, by one tensor for each expert."""
    experts = name.rpartition(".")[0]
    for place, part in enumerate(parameter.layouts[0].parts):
        leaf = part.module.rpartition(".")[2]
        for alias in next((aliases for aliases in _ALIASES if leaf in aliases), {leaf}):
            for rename in (name_of_a, name_of_b):
                found = tensors.get(rename(f"{experts}.{alias}"))
                if found is None or found.dim() != 3:
                    continue
                if len(found) not in (1, len(parameter.layouts)):
                    raise AdapterInvalidError(
                        f"{TENSORS}: {rename(f'{experts}.{alias}')} is {list(found.shape)}, not of 1 expert or of "
                        f"{len(parameter.layouts)}"
                    )
                del tensors[rename(f"{experts}.{alias}")]
                for number, layout in enumerate(parameter.layouts):
                    tensors[rename(layout.parts[place].module)] = found[number if len(found) > 1 else 0]
    whole = name_of_a(name), name_of_b(name)
    if len(parameter.layouts[0].parts) > 1 and all(each in tensors and tensors[each].dim() == 3 for each in whole):
        a, b = (tensors.pop(each) for each in whole)
        tensors |= _split(parameter, a, b)
    return tensors


def _renamed(parameter: Parameter, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replaces transformers' names of modules by the names in the base's file."""
    for module in parameter.modules:
        for other in _spellings(module)[1:]:
            for rename in (name_of_a, name_of_b):
                if rename(other) in tensors:
                    tensors[rename(module)] = tensors.pop(rename(other))
    return tensors
