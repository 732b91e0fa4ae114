"""The metadata that a GGUF file has for its architecture (github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from typing import Any

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.checkpoint.gguf.file import GgufFile


class Fields:
    """`read` collects the names of what was asked for."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.architecture = str(file.metadata.get("general.architecture"))
        self.read = set[str]()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return self.file.metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        """Raises CheckpointError if it is missing, not a number, or several that differ: one for each layer."""
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
            raise CheckpointError(f"metadata {self.architecture}.attention.value_length is not that of keys")
        return head_dim

    @property
    def rotated_part(self) -> float:
        """The fraction of each head that is rotated."""
        return self.integer("rope.dimension_count", self.head_dim) / self.head_dim
