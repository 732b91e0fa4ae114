"""What is made of an input instead of an answer."""

from array import array
from dataclasses import dataclass

from loraplex_protos.generation_pb2 import Classifier


@dataclass(frozen=True, slots=True)
class Embedding:
    """A vector of the last hidden states of an input."""

    values: "array[float]"
    prompt_tokens: int
    warnings: tuple[str, ...] = ()  # what its reader should know
    adapter_digest: str = ""
    adapter_version: str = ""


@dataclass(frozen=True, slots=True)
class Classification:
    """What a classifier makes of an input: one logit per label or, if it classifies tokens, per token and label."""

    classifier: Classifier
    logits: "array[float]"
    tokens: list[int]  # of the input
    warnings: tuple[str, ...] = ()
    adapter_digest: str = ""
    adapter_version: str = ""
