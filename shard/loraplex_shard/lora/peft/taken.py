"""Takes the tensors out of an adapter's file one by one, so that unknown ones remain."""

from collections.abc import Mapping

import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.tensor_names import PREFIX
from loraplex_shard.lora.sources.files import TENSORS


class Taken:
    """Tensors to be taken. Those that are left at the end are unknown."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.left = dict(tensors)

    def has(self, name: str) -> bool:
        return PREFIX + name in self.left

    def take(self, name: str, *shape: int | None, shared: bool = False) -> torch.Tensor:
        """Takes a tensor of this shape, in float32. A dimension of None may have any size. Raises AdapterInvalidError,
        naming the tensor, if it is missing or has another shape."""
        name = PREFIX + name
        if name not in self.left:
            raise AdapterInvalidError(f"{TENSORS}: missing {name}, which adapter_config.json calls for")
        tensor = self.left[name] if shared else self.left.pop(name)
        if len(tensor.shape) != len(shape) or any(
            size not in (None, found) for size, found in zip(shape, tensor.shape, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise AdapterInvalidError(
                f"{TENSORS}: {name} is {list(tensor.shape)}, not [{wanted}]: the adapter was made for another base, or"
                " adapter_config.json is not its own"
            )
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise AdapterInvalidError(f"{name} has values that are NaN or infinite")
        return tensor
