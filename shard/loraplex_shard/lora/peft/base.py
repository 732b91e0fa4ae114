"""What adapters are checked against and computed with: the base model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer

from loraplex_shard.shapes.classifier import Classes, Classifier
from loraplex_shard.shapes.layout import VocabularyLayout

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"  # the names in most models
ROWS_AT_A_TIME = 4096
# A fraction of a matrix's length that is larger than the error of rounding to 2 bits. A trained copy of the matrix may
# be as near as that; the matrix of another model is three times as far away.
ROUNDING = 0.5


class StoredTensors(Protocol):
    """The part of a checkpoint that adapters are compared with."""

    @property
    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, rows: slice = ...) -> torch.Tensor: ...

    def is_rounded(self, name: str) -> bool: ...


class ServedMatrices(Protocol):
    """The base's matrices as it computes with them: rounded if it is quantized."""

    def has(self, module: str) -> bool:
        """Whether this is a linear module that can be read."""
        ...

    def read(self, module: str, rows: slice) -> torch.Tensor:
        """Rows of a linear module's whole matrix: [rows, in_features] float32."""
        ...


class ServedWeights(Protocol):
    """The base's weights as it computes with them. Matrices are rounded if the base is quantized."""

    @property
    def tied(self) -> bool:
        """Whether the lm head is the embedding."""
        ...

    def read(self, module: str, rows: slice) -> torch.Tensor:
        """Rows of a linear module's, or the embedding's, whole matrix: [rows, in_features] float32."""
        ...

    def pack(self, matrix: torch.Tensor) -> Any:
        """Packs a matrix of floats for the operations that compute the model."""
        ...

    @property
    def vocabulary(self) -> VocabularyLayout: ...

    @property
    def resizable(self) -> bool:
        """Whether adapters may have another number of tokens."""
        ...

    @property
    def transposed(self) -> frozenset[str]:
        """Linear modules whose matrices files hold as [in_features, out_features]."""
        ...

    @property
    def norms(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the tensors that are norms' parameters, by name."""
        ...

    def read_norms(self, own: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        """This rank's parameters of all norms, with an adapter's own tensors in place of the base's: see OwnWeights."""
        ...


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What is known about the base model."""

    architecture: str  # the transformers class, e.g. "LlamaForCausalLM"
    ids: tuple[str, ...] = ()  # its names, hub ids or paths: first the served one, then those in its files
    revision: str = ""  # the hub revision that the server was started with
    tensors: StoredTensors | None = None  # None: tensors are not compared
    vocab_size: int = 0
    tokenizer: Tokenizer | None = None  # None: tokens are not compared
    embedding: str = EMBEDDING  # the module's name in PEFT
    head: str = HEAD
    served: ServedWeights | None = None  # None: adapters can replace no matrices, norms or tokens of the base
    matrices: ServedMatrices | None = None  # of linear layers; None: adapters cannot depend on them
    hidden_size: int = 0
    pad_token_id: int | None = None
    classifier: Classifier | None = None
    is_text_part: bool = False  # it is the text part of a model that also reads pictures
    uncalled: tuple[str, ...] = ()  # linear layers whose weights its code reads without calling them, so not PEFT's
    head_dim: int = 0  # 0: not known

    @property
    def backbone(self) -> str:
        """The module that holds the layers. If the embedding has its usual name, it is the embedding's parent."""
        holder, _, name = self.embedding.rpartition(".")
        return holder if name == "embed_tokens" else "model"

    @property
    def classes(self) -> Classes | None:
        """Of its classifier."""
        return None if self.classifier is None else self.classifier.classes

    def token_id(self, text: str) -> int | None:
        """The token for exactly this text, if there is one."""
        token: int | None = self.tokenizer.token_to_id(text) if self.tokenizer is not None else None
        return token

    def bias(self, module: str) -> torch.Tensor | None:
        """A linear module's bias, if it has one."""
        name = f"{module}.bias"
        return self.tensors.read(name) if self.tensors is not None and name in self.tensors.names else None

    def differing_rows(self, name: str, tensor: torch.Tensor, exactly: bool = False) -> torch.Tensor:
        """The rows [n] int64 of a matrix that are not the base's own of this name, as `holds` compares them; of one
        with more rows than the base's, the others too."""
        rows = torch.arange(len(tensor))
        if tensor.is_meta:
            return rows[self.vocab_size :]
        if self.tensors is None or (stored := self._stored_name(name)) is None:
            return rows
        common = min(len(tensor), self.tensors.shape(stored)[0])
        own = torch.ones(len(tensor), dtype=torch.bool)
        near = not exactly and self.tensors.is_rounded(stored)
        for start in range(0, common, ROWS_AT_A_TIME):
            part = slice(start, min(start + ROWS_AT_A_TIME, common))
            ours, theirs = _in_the_coarser_dtype(self.tensors.read(stored, part), tensor[part])
            own[part] = (ours != theirs).any(1)
            if near:
                differences = (ours.float() - theirs.float()).square().sum(1)
                own[part] = differences > ours.float().square().sum(1) * ROUNDING**2
        return rows[own]

    def holds(self, name: str, tensor: torch.Tensor, exactly: bool = False) -> bool:
        """Whether the tensor equals the base's tensor of this name. They are compared in the coarser of their dtypes.
        If the base's tensor is rounded to small integers, the difference may be as large as rounding makes it, unless
        `exactly`."""
        if self.tensors is None or (stored := self._stored_name(name)) is None:
            return False
        shape = self.tensors.shape(stored)
        if tuple(tensor.shape) != shape:
            return False
        if tensor.is_meta:
            return True
        difference = length = 0.0
        for start in range(0, shape[0], ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            ours, theirs = _in_the_coarser_dtype(self.tensors.read(stored, rows), tensor[rows])
            if not torch.equal(ours, theirs):
                difference += float((ours.float() - theirs.float()).square().sum())
            length += float(ours.float().square().sum())
        near = not exactly and self.tensors.is_rounded(stored)
        return difference <= length * ROUNDING**2 if near else difference == 0

    def _stored_name(self, name: str) -> str | None:
        """The tensor's name in the checkpoint, which may hold only one of two tied tensors."""
        embedding, head = f"{self.embedding}.weight", f"{self.head}.weight"
        names = (name, {head: embedding, embedding: head}.get(name, name))
        held = () if self.tensors is None else self.tensors.names
        return next((each for each in names if each in held), None)


def _in_the_coarser_dtype(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    coarser = min((ours.dtype, theirs.dtype), key=lambda dtype: -torch.finfo(dtype).eps)
    return ours.to(coarser), theirs.to(coarser)
