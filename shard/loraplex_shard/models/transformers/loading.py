"""Loads a model that runs with transformers' modeling code from a checkpoint, tensor by tensor."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.loading_report import LoadStateDictInfo

from loraplex_shard.checkpoint.base import Checkpoint, CheckpointError
from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.parameters import LoadableLayer, ParameterForm
from loraplex_shard.models.tensor_checks import differ, listed
from loraplex_shard.models.text_part import TextModel
from loraplex_shard.models.transformers.building import build, dtypes
from loraplex_shard.models.transformers.checking import check_model, refused_by_name
from loraplex_shard.models.transformers.experts import ExpertsInPlace
from loraplex_shard.models.transformers.linear import ForwardContext, InPlace
from loraplex_shard.models.transformers.model import TransformersModel
from loraplex_shard.models.transformers.parallel_rules import ParallelRules
from loraplex_shard.models.transformers.replacing import Replacement
from loraplex_shard.models.transformers.tensors import ModelTensors
from loraplex_shard.ops.base import Operations

logger = logging.getLogger(__name__)


def load_transformers(
    checkpoint: Checkpoint | TextModel,
    group: Group,
    ops: Operations,
    form: ParameterForm,
    max_model_len: int,
    progress: Callable[[int, int], None] | None = None,
) -> TransformersModel:
    """Does what choosing.load_model says."""
    traits = check_model(checkpoint, max_model_len, group.rank, group.size, form.dtype)
    model = build(checkpoint.config, form.dtype, max_model_len)
    if checkpoint.classifies:
        traits = traits.without_head()
    for name in traits.idle:
        model.set_submodule(name, nn.Module())
    tensors, tensor_dtypes = ModelTensors(checkpoint, model, traits.idle), dtypes(model, form.dtype)
    _check(checkpoint, model, tensors)
    rules = ParallelRules(model.tp_plan or {}, checkpoint.architecture, group.rank, group.size)
    context = ForwardContext(form.device)
    Replacement(traits, rules, group, ops, context, tensor_dtypes).apply(model)
    tied = _tied(model, tensors, form.dtype)
    for loaded, _ in enumerate(_load(model, tensors, rules, form, tensor_dtypes, tied), start=1):
        if progress is not None:
            progress(loaded, len(tensors.names))
    tensors.release()
    built = TransformersModel(model, tensors, traits, context, group, ops, form, tied is not None)
    with refused_by_name(checkpoint):
        built.check_positions()
    return built


def _check(checkpoint: Checkpoint | TextModel, model: PreTrainedModel, tensors: ModelTensors) -> None:
    """Checks the model's tensors: there must be all of them, with their shapes, and no others but those that
    transformers ignores."""
    wanted = model.state_dict()
    found = LoadStateDictInfo(wanted.keys() - tensors.names, tensors.unused, set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(found)
    if missing := found.missing_keys | (wanted.keys() - tensors.names - dict(model.named_buffers()).keys()):
        raise CheckpointError(f"{checkpoint.model_id}: missing {listed(missing)}")
    if extra := {name for name in found.unexpected_keys if not tensors.is_zero_bias(name)}:
        raise CheckpointError(f"{checkpoint.model_id}: {checkpoint.architecture} has no {listed(extra)}")
    for name in wanted.keys() & tensors.names:
        if tensors.stored_shape(name) != tuple(wanted[name].shape):
            raise CheckpointError(
                f"{checkpoint.model_id}: tensor {name} has shape {list(tensors.stored_shape(name))}, "
                f"but the configuration asks for {list(wanted[name].shape)}"
            )


def _load(
    model: PreTrainedModel,
    tensors: ModelTensors,
    rules: ParallelRules,
    form: ParameterForm,
    dtypes: Mapping[str, torch.dtype],
    tied: tuple[InPlace, InPlace] | None,
) -> Iterator[str]:
    """Loads the model's tensors, and yields the name of each."""
    if tied is not None:
        tied[0].layer.matrix = ()  # if it has a bias, that is not tied
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, InPlace):
            yield from module.layer.load(tensors, replace(form, dtype=dtypes[f"{prefix}weight"]))
        elif isinstance(module, ExpertsInPlace):
            yield from module.load(tensors, form)
        elif not isinstance(module, LoadableLayer):
            for own, values in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                tensor = prefix + own
                if tensor in dtypes and tensor in tensors.names:
                    values = rules.cut(tensor, tensors.read(tensor)).to(dtypes[tensor])
                    yield tensor
                _set(module, own, values.to(form.device))
    if tied is not None:
        head, embedding = tied
        head.tie(embedding)


def _tied(model: PreTrainedModel, tensors: ModelTensors, dtype: torch.dtype) -> tuple[InPlace, InPlace] | None:
    """The lm head and the embedding, if they are the same matrix."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, InPlace) or not isinstance(embedding, InPlace):
        return None
    own, other = head.layer.matrix[0].tensor, embedding.layer.matrix[0].tensor
    if model.all_tied_weights_keys.get(own) != other:
        return None
    if differ(tensors, own, other, dtype):
        logger.warning("config.json says tie_word_embeddings, but %s differs from %s: both are used", own, other)
        return None
    return head, embedding


def _set(module: nn.Module, name: str, values: torch.Tensor) -> None:
    if name in module._parameters:
        module.register_parameter(name, nn.Parameter(values, requires_grad=False))
    else:
        module._buffers[name] = values
