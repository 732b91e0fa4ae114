"""Whether an adapter's tensors have the shapes that its configuration and the base ask for."""

from collections.abc import Collection, Mapping

import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.sources.files import TENSORS

_SHOWN_NAMES = 3
_REASONS = {
    "lora_rank": "adapter_config.json says so",
    "indices": "adapter_config.json says so",
    "tokens": "the adapter was made for another base, or its embedding and lm head were resized and not saved with it"
    " (PEFT: save_pretrained(..., save_embedding_layers=True))",
}


def check_shape(tensors: Mapping[str, torch.Tensor], name: str, **dimensions: int) -> None:
    """Raises AdapterInvalidError if the tensor does not have these sizes, each after its label."""
    shape, expected = list(tensors[name].shape), list(dimensions.values())
    if shape == expected:
        return
    if len(shape) != len(expected):
        kind = "a matrix" if len(expected) == 2 else "a vector"
        raise AdapterInvalidError(f"{TENSORS}: {name} is {shape}, not {kind}")
    wrong = {label: size for (label, size), found in zip(dimensions.items(), shape, strict=True) if size != found}
    reason = next((_REASONS[label] for label in wrong if label in _REASONS), "the adapter was made for another base")
    needed = " and ".join(f"{label} {size}" for label, size in wrong.items())
    raise AdapterInvalidError(f"{TENSORS}: {name} is {shape}, not {expected}: it needs {needed}: {reason}")


def listed(names: Collection[str]) -> str:
    """The first few of them."""
    shown = ", ".join(name[:200] for name in sorted(names)[:_SHOWN_NAMES])
    return f"{shown} and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else shown
