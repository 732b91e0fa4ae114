"""What a checkpoint offers, whatever its format."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from transformers import PreTrainedConfig

from loraplex_protos.errors import LoraplexError
from loraplex_shard.ops.quantized import QuantizedMatrix


class CheckpointError(LoraplexError):
    """The checkpoint cannot be served: the message names the file, tensor or field, and the fix where there is one."""


@contextmanager
def errors_of(model_id: str) -> Iterator[None]:
    """Has a CheckpointError say which checkpoint it is about."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{model_id}: {error.message}") from error


PoolingMode: TypeAlias = Literal["mean", "last", "first"]


@dataclass(frozen=True, slots=True)
class PoolingSpec:
    """The mean over all positions, or the hidden state of the last or the first; scaled to length 1 or as it is."""

    mode: PoolingMode = "mean"
    normalized: bool = True


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the router needs to turn text into token ids and back."""

    tokenizer_json: bytes  # as the `tokenizers` library reads it
    chat_templates: Mapping[str, str]  # Jinja2, by name: "default", and others such as "tool_use"
    special_tokens: Mapping[str, str]  # that the templates name: "eos_token" and the like


class Checkpoint(Protocol):
    """A model's files, open for reading. Tensors carry the names that transformers gives them."""

    @property
    def model_id(self) -> str:
        """How the model is called in messages and answers."""

    @property
    def config(self) -> PreTrainedConfig: ...

    @property
    def architecture(self) -> str:
        """The transformers class, for example "LlamaForCausalLM"."""

    @property
    def is_backbone(self) -> bool:
        """Whether it was saved from the class without a head, as embedding models are."""

    @property
    def names(self) -> frozenset[str]:
        """All tensors."""

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a sequence. The first is the one that the tokenizer calls its end token, if any."""

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Fields of Sampling in generation.proto."""

    @property
    def prequantized(self) -> bool:
        """Whether its matrices were made to be used in the integers that they are stored in."""

    @property
    def known_as(self) -> tuple[str, ...]:
        """What its own files call the model, beside `model_id`."""

    @property
    def pooling(self) -> PoolingSpec:
        """How a text's embedding is made of its tokens' hidden states."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def is_rounded(self, name: str) -> bool:
        """Whether the tensor is stored in small integers, so that it is not quite what the model was trained with."""

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """That part of a tensor, and no more, is read from the file; `columns` is for matrices only."""

    def read_quantized(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> QuantizedMatrix | None:
        """That part of a matrix as it is stored, if it is stored in a quantized form that ops/quantized.py knows."""

    def tokenizer(self) -> TokenizerFiles: ...
