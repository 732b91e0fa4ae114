"""An adapter's files -> the weights that this rank's layers use. Knows nothing of sources, slots or devices.

Every rank checks the whole adapter and then keeps its cut, so that all ranks agree on what is refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.layers.layout import LinearLayout, LinearPart
from loraplex_shard.lora.config import parse_config
from loraplex_shard.lora.deltas import Adapter, Delta, cut_adapter, name_of_a, name_of_b
from loraplex_shard.lora.files import TENSORS, AdapterFiles
from loraplex_shard.lora.targets import LM_HEAD, Target, find_targets
from loraplex_shard.lora.tensors import read_tensors

_PREFIX = "base_model.model."
_SHOWN_NAMES = 3


def read_adapter(
    files: AdapterFiles, layouts: Sequence[LinearLayout], architecture: str, dtype: torch.dtype
) -> Adapter:
    """Checks a PEFT LoRA adapter and cuts it to the layouts, in this dtype, in memory of its own.

    Raises AdapterInvalidError, naming the field or tensor, for one that cannot be served exactly as PEFT would.
    """
    adapter = cut_adapter(read_deltas(files, layouts, architecture), layouts, dtype)
    return replace(adapter, chat_template=files.chat_template)


def read_deltas(files: AdapterFiles, layouts: Sequence[LinearLayout], architecture: str) -> dict[str, Delta]:
    """The whole adapter, by module: checked, but for whether its values are finite. Its tensors are views of the file.

    Raises AdapterInvalidError as read_adapter does.
    """
    config = parse_config(files.config, architecture)
    parts = {part.module: (layout, part) for layout in layouts for part in layout.parts}
    targets = find_targets(config, tuple(parts))
    tensors = read_tensors(files.tensors)
    _check_names(tensors.keys(), targets, parts.keys())
    for module, target in targets.items():
        _check_shapes(tensors, module, target, *parts[module])
    return {
        module: Delta(tensors[name_of_a(module)], tensors[name_of_b(module)], target.scale)
        for module, target in targets.items()
    }


def _check_names(names: Iterable[str], targets: Mapping[str, Target], modules: Iterable[str]) -> None:
    """There must be an A and a B of each target, and nothing else."""
    present, expected = set(names), {name for module in targets for name in (name_of_a(module), name_of_b(module))}
    # PEFT saves the base's lm_head with an adapter of it. Training leaves it as it is.
    present.discard(f"{_PREFIX}{LM_HEAD}.base_layer.weight" if LM_HEAD in targets else "")
    known = tuple(f"{_PREFIX}{module}." for module in modules)
    extra = present - expected
    foreign = {name for name in extra if not name.startswith(known)}
    if foreign:
        raise AdapterInvalidError(
            f"{TENSORS}: no linear layer of this model fits {_list(foreign)}: the adapter was made for another base,"
            " or adapts more than linear layers"
        )
    if extra:
        raise AdapterInvalidError(f"{TENSORS}: adapter_config.json does not call for {_list(extra)}")
    if missing := expected - present:
        raise AdapterInvalidError(f"{TENSORS}: missing {_list(missing)}, which adapter_config.json calls for")


def _list(names: set[str]) -> str:
    shown = ", ".join(name[:200] for name in sorted(names)[:_SHOWN_NAMES])
    return f"{shown} and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else shown


def _check_shapes(
    tensors: Mapping[str, torch.Tensor], module: str, target: Target, layout: LinearLayout, part: LinearPart
) -> None:
    lora_rank, inputs, outputs = target.lora_rank, layout.in_features, part.out_features
    _check_shape(tensors, name_of_a(module), lora_rank=lora_rank, in_features=inputs)
    _check_shape(tensors, name_of_b(module), out_features=outputs, lora_rank=lora_rank)


def _check_shape(tensors: Mapping[str, torch.Tensor], name: str, **dimensions: int) -> None:
    shape, expected = list(tensors[name].shape), list(dimensions.values())
    if shape == expected:
        return
    if len(shape) != len(expected):
        raise AdapterInvalidError(f"{TENSORS}: {name} is {shape}, not a matrix")
    wrong = {label: size for (label, size), found in zip(dimensions.items(), shape, strict=True) if size != found}
    reason = "adapter_config.json says so" if "lora_rank" in wrong else "the adapter was made for another base"
    needed = " and ".join(f"{label} {size}" for label, size in wrong.items())
    raise AdapterInvalidError(f"{TENSORS}: {name} is {shape}, not {expected}: it needs {needed}: {reason}")
