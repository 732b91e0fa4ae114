"""The base model, as far as an adapter can be compared with it."""

from dataclasses import dataclass
from typing import Protocol

import torch
from tokenizers import Tokenizer

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"  # as most models call them
ROWS_AT_A_TIME = 4096
# More than rounding to 2 bits moves a matrix by, as a fraction of its length. What training did is lost in that; the
# matrix of another model is three times as far away.
ROUNDING = 0.5


class StoredTensors(Protocol):
    """The part of a checkpoint that adapters are compared with."""

    @property
    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, rows: slice = ...) -> torch.Tensor: ...

    def is_rounded(self, name: str) -> bool: ...


class ServedMatrices(Protocol):
    """The base's matrices as it computes with them: rounded, if it is."""

    @property
    def tied(self) -> bool:
        """Whether the embedding is the lm head."""
        ...

    def read(self, module: str, rows: slice) -> torch.Tensor:
        """Rows of a linear module's whole matrix: [rows, in_features] float32."""
        ...


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What is known of it."""

    architecture: str  # the transformers class, e.g. "LlamaForCausalLM"
    ids: tuple[str, ...] = ()  # what it is called, hub ids or paths: first as it is served, then by its files
    revision: str = ""  # the hub's, as the server was asked for it
    tensors: StoredTensors | None = None  # None: not to be compared
    vocab_size: int = 0
    tokenizer: Tokenizer | None = None  # None: no text is known to be a token
    embedding: str = EMBEDDING  # the module's name, as PEFT has it
    head: str = HEAD
    served: ServedMatrices | None = None  # None: adapters cannot depend on them, or replace them

    @property
    def backbone(self) -> str:
        """The module that holds the layers: the one that holds the embedding, where it has the name that most have."""
        holder, _, name = self.embedding.rpartition(".")
        return holder if name == "embed_tokens" else "model"

    def token_id(self, text: str) -> int | None:
        """The token that stands for exactly this text."""
        token: int | None = self.tokenizer.token_to_id(text) if self.tokenizer is not None else None
        return token

    def bias(self, module: str) -> torch.Tensor | None:
        """A linear module's bias, if it has one."""
        name = f"{module}.bias"
        return self.tensors.read(name) if self.tensors is not None and name in self.tensors.names else None

    def holds(self, name: str, tensor: torch.Tensor, exactly: bool = False) -> bool:
        """Whether the tensor is the base's own of this name: in the coarser of their dtypes, or, if the base's is
        rounded to small integers, and not `exactly` the same is asked for, as near to it as rounding leaves it."""
        if self.tensors is None or (stored := self._stored_name(name)) is None:
            return False
        shape = self.tensors.shape(stored)
        if tuple(tensor.shape) != shape:
            return False
        difference = length = 0.0
        for start in range(0, shape[0], ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            ours, theirs = self.tensors.read(stored, rows), tensor[rows]
            coarser = min((ours.dtype, theirs.dtype), key=lambda dtype: -torch.finfo(dtype).eps)
            ours, theirs = ours.to(coarser), theirs.to(coarser)
            if not torch.equal(ours, theirs):
                difference += float((ours.float() - theirs.float()).square().sum())
            length += float(ours.float().square().sum())
        near = not exactly and self.tensors.is_rounded(stored)
        return difference <= length * ROUNDING**2 if near else difference == 0

    def _stored_name(self, name: str) -> str | None:
        """Of two tied tensors a checkpoint may hold only one."""
        embedding, head = f"{self.embedding}.weight", f"{self.head}.weight"
        names = (name, {head: embedding, embedding: head}.get(name, name))
        held = () if self.tensors is None else self.tensors.names
        return next((each for each in names if each in held), None)
