"""What a checkpoint offers, in any format."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from transformers import PreTrainedConfig

from loraplex_protos.errors import LoraplexError
from loraplex_shard.ops.quantized import Quantized
from loraplex_shard.shapes.classifier import Classifier


class CheckpointError(LoraplexError):
    """The checkpoint cannot be served. The message names the file, tensor or field, and the fix if there is one."""


@contextmanager
def errors_of(model_id: str) -> Iterator[None]:
    """Adds the checkpoint's name to a CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{model_id}: {error.message}") from error


PoolingMode: TypeAlias = Literal["mean", "last", "first"]


@dataclass(frozen=True, slots=True)
class PoolingSpec:
    """How an embedding is made of hidden states: their mean, the last or the first, scaled to length 1 or not."""

    mode: PoolingMode = "mean"
    normalized: bool = True


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the router needs to turn text into token ids and back."""

    tokenizer_json: bytes  # in the format of the `tokenizers` library
    chat_templates: Mapping[str, str]  # Jinja2, by name: "default", and others such as "tool_use"
    special_tokens: Mapping[str, str]  # by the names that templates use, such as "eos_token"


class Checkpoint(Protocol):
    """A model's files, open for reading. Tensors have the names that transformers gives them."""

    @property
    def model_id(self) -> str:
        """The model's name in messages and answers."""

    @property
    def config(self) -> PreTrainedConfig: ...

    @property
    def architecture(self) -> str:
        """The transformers class, for example "LlamaForCausalLM"."""

    @property
    def is_backbone(self) -> bool:
        """Whether the checkpoint was saved from the class without a head, as embedding models are."""

    @property
    def classifies(self) -> bool:
        """Whether the checkpoint was saved from a class with a classifier instead of the lm head."""

    @property
    def names(self) -> frozenset[str]:
        """The names of all tensors."""

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a sequence. The first one is the tokenizer's own end token, if it has one."""

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """The model's own values for fields of Sampling in generation.proto."""

    @property
    def prequantized(self) -> bool:
        """Whether the checkpoint was quantized in order to compute with the stored integers."""

    @property
    def in_float8(self) -> bool:
        """Whether the checkpoint has matrices in a float8 form of ops/quantized.py."""

    @property
    def known_as(self) -> tuple[str, ...]:
        """Other names of the model, from the checkpoint's own files."""

    @property
    def pooling(self) -> PoolingSpec:
        """How the embedding of a text is made of its tokens' hidden states."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def is_rounded(self, name: str) -> bool:
        """Whether the tensor is stored in small integers, and so differs a little from the trained values."""

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """Reads a part of a tensor, and only that part, from the file. `columns` is for matrices only."""

    def read_quantized(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Quantized | None:
        """Reads a part of a matrix in the numbers in which it is stored. Returns None if it is not stored in a form of
        ops/quantized.py."""

    def tokenizer(self) -> TokenizerFiles: ...

    def classifier(self) -> Classifier | None:
        """The classifier of a model that classifies. Its tensors are not in `names`."""
