"""The metadata of a GGUF file that belongs to its architecture
(github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from typing import Any

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.checkpoint.gguf.file import GgufFile


class Fields:
    """Reads an architecture's metadata by key. `read` collects the keys that were asked for."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.architecture = str(file.metadata.get("general.architecture"))
        self.read = set[str]()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return self.file.metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        """Raises CheckpointError if the value is missing, is not a number, or differs between layers."""
        value = self.get(key, default)
        if isinstance(value, list) and len({*value}) == 1:
            value = value[0]
        if not isinstance(value, int | float):
            raise CheckpointError(f"metadata {self.architecture}.{key} is missing or not one number for all layers")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self.number(key, default))

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    @property
    def head_dim(self) -> int:
        heads = self.integer("attention.head_count")
        head_dim = self.integer("attention.key_length", self.integer("embedding_length") // heads)
        if self.integer("attention.value_length", head_dim) != head_dim:
            raise CheckpointError(f"metadata {self.architecture}.attention.value_length differs from key_length")
        return head_dim

    @property
    def rotated_part(self) -> float:
        """The fraction of each head's dimensions that is rotated."""
        return self.integer("rope.dimension_count", self.head_dim) / self.head_dim
