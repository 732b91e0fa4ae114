"""Models that classify: transformers' ...ForSequenceClassification and ...ForTokenClassification of a decoder. They are
a decoder with a linear layer on its last hidden states."""

import re
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.shapes.classifier import Activation, Classes, Classifier, activation_of, most_labels

NAMES = ("score", "classifier")  # the layer's names in transformers' classes
_ACTIVATION = re.compile(r"torch\.nn\.modules\.(?:activation|linear)\.(\w+)")


class Tensors(Protocol):
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> torch.Tensor: ...


def classifies(config: PreTrainedConfig) -> bool:
    """Whether the class named in config.json classifies."""
    kinds = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
    named = {names.get(config.model_type) for names in kinds} - {None}
    return not named.isdisjoint(config.architectures or ())


def tensors_of_classifier(names: frozenset[str]) -> frozenset[str]:
    """The tensors of a checkpoint that belong to the classifier."""
    return names.intersection(f"{module}.{kind}" for module in NAMES for kind in ("weight", "bias"))


def read_classifier(tensors: Tensors, names: frozenset[str], config: PreTrainedConfig) -> Classifier:
    """`names`: its tensors. Raises CheckpointError if there are none, or none that fit the configuration."""
    architecture = (config.architectures or [""])[0]
    weight = next((name for name in sorted(names) if name.endswith(".weight")), "")
    if not weight:
        raise CheckpointError(f"missing tensor {NAMES[0]}.weight, the classifier of {architecture}")
    hidden, named = config.get_text_config(decoder=True).hidden_size, dict[Any, Any](config.id2label or {})
    labels = len(named)
    bias = weight.removesuffix("weight") + "bias"
    for name, shape in {weight: (labels, hidden), bias: (labels,)}.items():
        if name in names and tensors.shape(name) != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(tensors.shape(name))}, but the configuration (num_labels or id2label, "
                f"and hidden_size) asks for {list(shape)}"
            )
    of_tokens = architecture.endswith("ForTokenClassification")
    if not labels:
        raise CheckpointError("config.json: id2label has no labels")
    if labels > (most := most_labels(of_tokens)):
        raise CheckpointError(f"config.json: {labels} labels are not served, at most {most}")
    _check_bias(tensors, names, bias, of_tokens and getattr(config, "token_classification_bias", True), architecture)
    classes = Classes(
        of_tokens=of_tokens,
        labels=tuple(str(named.get(index, f"LABEL_{index}")) for index in range(labels)),
        activation=read_activation(config.to_dict(), labels),
        joins_pairs=not all(getattr(config, name, True) for name in ("use_sep_token", "use_pad_token")),  # vLLM's
        pad_token_id=config.get_text_config(decoder=True).pad_token_id,
    )
    return Classifier(tensors.read(weight).float(), tensors.read(bias).float() if bias in names else None, classes)


def _check_bias(tensors: Tensors, names: frozenset[str], bias: str, wanted: bool, architecture: str) -> None:
    """Checks the bias: transformers would ignore one that its class does not have, and initialize one that is
    missing."""
    if wanted and bias not in names:
        raise CheckpointError(f"missing tensor {bias}")
    if not wanted and bias in names and tensors.read(bias).any():
        raise CheckpointError(f"{architecture} has no tensor {bias}")


def read_activation(config: Mapping[str, Any], labels: int) -> Activation:
    """The function of a classifier with this config.json. It follows from problem_type or, for cross-encoders without
    one, is the function that sentence-transformers stored. Raises CheckpointError for a function that is not served."""
    usual = activation_of(labels, config.get("problem_type"))
    if config.get("problem_type") is not None:
        return usual
    stored = config.get("sentence_transformers")
    named = stored.get("activation_fn") if isinstance(stored, Mapping) else None
    named = named or config.get("sbert_ce_default_activation_function")
    if not named:
        return usual
    function = _ACTIVATION.fullmatch(str(named))
    if function is None or function[1] not in ("Identity", "Sigmoid", "Softmax"):
        raise CheckpointError(f"config.json: the activation function {str(named)[:100]} is not served")
    return Activation.NONE if function[1] == "Identity" else usual
