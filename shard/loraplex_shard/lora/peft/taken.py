"""The tensors of an adapter's file, taken one by one for what they are."""

from collections.abc import Mapping

import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.tensor_names import PREFIX
from loraplex_shard.lora.sources.files import TENSORS


class Taken:
    """Tensors of which some are taken: what is left is nobody's."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.left = dict(tensors)

    def has(self, name: str) -> bool:
        return PREFIX + name in self.left

    def take(self, name: str, *shape: int | None, shared: bool = False) -> torch.Tensor:
        """A tensor of this shape, in float32; None: of any size. Raises AdapterInvalidError with its name, if it is
        missing or another one."""
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
