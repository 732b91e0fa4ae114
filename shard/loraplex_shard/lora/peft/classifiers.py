"""The classifier of an adapter: the linear layer on the last hidden states that PEFT trains and saves whole
(modules_to_save) for sequence and token classification, or the model's with LoRA on it. The meaning of its labels may
be in another file beside it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.config import CLASSIFIERS, AdapterConfig
from loraplex_shard.lora.peft.outputs import Replaced, with_outputs
from loraplex_shard.lora.peft.tensor_names import PREFIX
from loraplex_shard.lora.sources.files import CONFIG, TENSORS
from loraplex_shard.lora.sources.model_config import ModelConfig
from loraplex_shard.lora.weights.deltas import Delta
from loraplex_shard.shapes.classifier import Activation, Classes, Classifier, activation_of, most_labels
from loraplex_shard.shapes.layout import LinearLayout, LinearPart

_TENSOR = re.compile(
    re.escape(PREFIX)
    + rf"(?P<module>{'|'.join(CLASSIFIERS)})(?P<wrapper>\.original_module|\.base_layer|\.modules_to_save(?:\.[^.]+)?)?"
    r"\.(?P<kind>weight|bias)"
)
_ADAPTED = re.compile(re.escape(PREFIX) + rf"({'|'.join(CLASSIFIERS)})\.lora_.+")
_KINDS = {"SEQ_CLS": False, "TOKEN_CLS": True}  # whether tokens are classified
_CLASSES = {"ForSequenceClassification": False, "ForTokenClassification": True}


def is_of_classifier(name: str) -> bool:
    """Whether the tensor, by PEFT's name, is a part of a classifier that was trained whole."""
    return _TENSOR.fullmatch(name) is not None


def adapted_classifier(
    config: AdapterConfig, names: Iterable[str], base: BaseModel
) -> dict[str, tuple[LinearLayout, LinearPart]]:
    """The model's classifier as a linear layer, by its module's name, if the file has LoRA on it. If the task_type is
    of classification, PEFT trains classifiers whole, and passes over such tensors."""
    if base.classifier is None or config.task_type in _KINDS:
        return {}
    modules = {match[1] for name in names if (match := _ADAPTED.fullmatch(name))}
    labels, inputs = base.classifier.weight.shape
    parts = {module: LinearPart(module, labels, (slice(0, labels),)) for module in modules}
    return {
        module: (LinearLayout(module, 0, (part,), inputs, slice(0, inputs)), part) for module, part in parts.items()
    }


def with_lora(module: str, delta: Delta, tensors: Mapping[str, torch.Tensor], base: BaseModel) -> Classifier:
    """The model's classifier with the delta, and with what else the adapter's tensors do to its output."""
    own = base.classifier
    assert own is not None
    delta = with_outputs(module, delta, tensors, Replaced(own.weight, own.bias), base)
    if delta.whole is None:  # there are only the shapes
        return own
    return Classifier(delta.whole + delta.scale * delta.b.float() @ delta.a.float(), delta.shift, own.classes)


def read_classifier(
    config: AdapterConfig, tensors: Mapping[str, torch.Tensor], said: ModelConfig, base: BaseModel
) -> tuple[Classifier | None, tuple[str, ...]]:
    """The classifier among an adapter's tensors, by PEFT's names, if there is one, and its possible problems.

    `said` is what a config.json beside the adapter says. Raises AdapterInvalidError for a classifier that does not fit.
    """
    found = {name: match for name in tensors if (match := _TENSOR.fullmatch(name))}
    # PEFT keeps the base's own classifier in addition to the trained one.
    own = {name: m for name, m in found.items() if m["wrapper"] not in (".original_module", ".base_layer")}
    if not own:
        return None, _missed(config, base)
    if len({match["module"] for match in own.values()}) > 1:
        raise AdapterInvalidError(f"{TENSORS}: {' and '.join(sorted(own))}: a model has one classifier")
    parts = {match["kind"]: (name, tensors[name]) for name, match in own.items()}
    if "weight" not in parts:
        raise AdapterInvalidError(f"{TENSORS}: {next(iter(own))} has no weight beside it")
    (name, weight), of_tokens = parts["weight"], _of_tokens(config, base)
    labels = weight.shape[0] if weight.dim() == 2 else 0
    if not labels or weight.shape[1] != base.hidden_size:
        raise AdapterInvalidError(
            f"{TENSORS}: {name} is {list(weight.shape)}, not [labels, {base.hidden_size}]: the adapter was made for "
            "another base"
        )
    if labels > (most := most_labels(of_tokens)):
        what = "each token" if of_tokens else "a text"
        raise AdapterInvalidError(f"{TENSORS}: {name} gives {labels} labels to {what}: at most {most} are served")
    bias = parts.get("bias", ("", None))[1]
    if bias is not None and list(bias.shape) != [labels]:
        raise AdapterInvalidError(f"{TENSORS}: {parts['bias'][0]} is {list(bias.shape)}, not [{labels}]")
    for own_name, tensor in parts.values():
        if not tensor.float().isfinite().all():
            raise AdapterInvalidError(f"{TENSORS}: {own_name} has values that are NaN or infinite")
    names, doubts = _labels(config, said, base, labels)
    classes = Classes(of_tokens, names, _activation(said, base, labels), pad_token_id=base.pad_token_id)
    if said.pad_token_id is not None:
        classes = replace(classes, pad_token_id=said.pad_token_id)
    return Classifier(weight.float(), None if bias is None else bias.float(), classes), doubts


def _missed(config: AdapterConfig, base: BaseModel) -> tuple[str, ...]:
    if config.task_type not in _KINDS or base.classes is not None:
        return ()
    return (f"task_type is {config.task_type!r}, but neither the file nor this model has a classifier: ignored",)


def _of_tokens(config: AdapterConfig, base: BaseModel) -> bool:
    if config.task_type in _KINDS:
        return _KINDS[config.task_type]
    made_for = (config.auto_mapping and config.auto_mapping.base_model_class) or ""
    for ending, of_tokens in _CLASSES.items():
        if made_for.endswith(ending):
            return of_tokens
    if base.classes is not None:
        return base.classes.of_tokens
    raise AdapterInvalidError(
        f"{CONFIG}: task_type is {config.task_type!r}, but the file has a classifier: set it to SEQ_CLS or TOKEN_CLS"
    )


def _labels(
    config: AdapterConfig, said: ModelConfig, base: BaseModel, count: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The labels' names, and possible problems with them. Without given names, they have transformers' default
    names."""
    named = {CONFIG: config.labels, "config.json": said.labels}
    doubts = tuple(
        f"{file}: id2label has {len(labels)} labels, but the classifier {count}: ignored"
        for file, labels in named.items()
        if labels and len(labels) != count
    )
    of_base = base.classes.labels if base.classes is not None else ()
    fitting = (labels for labels in (*named.values(), of_base) if labels and len(labels) == count)
    return next(fitting, tuple(f"LABEL_{index}" for index in range(count))), doubts


def _activation(said: ModelConfig, base: BaseModel, count: int) -> Activation:
    """The classifier's function. PEFT's classifiers belong to a model with the base's configuration, unless there is
    another config.json beside the adapter."""
    if said.problem_type:
        return activation_of(count, said.problem_type)
    if base.classes is not None and len(base.classes.labels) == count:
        return base.classes.activation
    return activation_of(count)
