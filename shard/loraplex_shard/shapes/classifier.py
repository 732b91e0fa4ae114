"""The linear layer that classifies a sequence or each of its tokens. It is whole on every rank, and never quantized."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch.nn.functional import linear

# The answer of a step, for all of its texts or for all of their tokens, must fit into one message.
MAX_LABELS, MAX_TOKEN_LABELS = 2**14, 2**10


class Activation(Enum):
    """The function that turns logits into scores. The values are those of generation.proto."""

    SOFTMAX = 1  # the scores of all labels add up to 1
    SIGMOID = 2  # each label's score is independent of the others
    NONE = 3


_OF_PROBLEMS = {"regression": Activation.NONE, "multi_label_classification": Activation.SIGMOID}


def activation_of(labels: int, problem_type: str | None = None) -> Activation:
    """The function for a problem type, as in vLLM. `problem_type` is transformers'."""
    return _OF_PROBLEMS.get(problem_type or "", Activation.SOFTMAX if labels > 1 else Activation.SIGMOID)


def most_labels(of_tokens: bool) -> int:
    return MAX_TOKEN_LABELS if of_tokens else MAX_LABELS


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a classifier."""

    of_tokens: bool  # each token is classified, not the sequence
    labels: tuple[str, ...]  # in the order of the logits
    activation: Activation
    joins_pairs: bool = False  # the second of two texts follows the first one directly
    pad_token_id: int | None = None  # a sequence is classified at its last token that is not this one


@dataclass(frozen=True, slots=True)
class Classifier:
    weight: torch.Tensor  # [labels, hidden] float32
    bias: torch.Tensor | None  # [labels] float32
    classes: Classes

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden], the input of the lm head -> [..., labels] float32."""
        return linear(hidden.float(), self.weight, self.bias)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Classifier":
        """Returns a copy with the function applied to each tensor."""
        return replace(self, weight=function(self.weight), bias=None if self.bias is None else function(self.bias))
