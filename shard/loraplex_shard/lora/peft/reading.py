"""Reads an adapter's files into the weights that this rank's layers use. Knows nothing about sources, slots or devices.

Every rank checks the whole adapter before it cuts its part, so all ranks refuse the same adapters.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from loraplex_protos.errors import AdapterInvalidError, FieldViolation, InvalidRequestError
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.classifiers import is_of_classifier, read_classifier
from loraplex_shard.lora.peft.config import AdapterConfig
from loraplex_shard.lora.peft.doubts import find_doubts
from loraplex_shard.lora.peft.experts import Parameter, absent, by_expert, find_parameters
from loraplex_shard.lora.peft.forms import as_served, as_trained, modules_in_any_form
from loraplex_shard.lora.peft.invocation import read_invocation
from loraplex_shard.lora.peft.kinds import Ia3Config
from loraplex_shard.lora.peft.mlx import MlxConfig, in_pefts_terms, targets_in_file
from loraplex_shard.lora.peft.outputs import (
    Replaced,
    name_of_bias,
    name_of_factors,
    name_of_magnitude,
    nothing,
    with_outputs,
)
from loraplex_shard.lora.peft.parsing import parse_config
from loraplex_shard.lora.peft.products import in_plain_terms
from loraplex_shard.lora.peft.special_tokens import end_tokens, foreign_tokens
from loraplex_shard.lora.peft.targets import Target, find_targets, is_named
from loraplex_shard.lora.peft.tensor_names import PREFIX, as_saved_by_peft, former_names, is_of_another_part
from loraplex_shard.lora.peft.tensors import read_tensors
from loraplex_shard.lora.sources.files import TENSORS, AdapterFiles
from loraplex_shard.lora.weights.deltas import Delta, HostAdapter, name_of_a, name_of_b, partition_adapter
from loraplex_shard.shapes.classifier import Classifier
from loraplex_shard.shapes.layout import LinearLayout, LinearPart

_SHOWN_NAMES = 3
_MERGED = frozenset({"LORA", "IA3", "MLX-LM"})
# The names under which PEFT saves the base's own tensors with some adapters.
_BASE_TENSOR = re.compile(
    re.escape(PREFIX)
    + r"(?P<module>(?:(?!\.lora_).)+?)(?P<wrapper>\.base_layer|\.original_module|\.modules_to_save(?:\.[^.]+)?)?"
    r"\.(?P<kind>weight|bias)"
)
_CLASSIFIER = re.compile(r"\.(score|classifier|qa_outputs)\.")  # transformers' names for other heads


def read_adapter(
    files: AdapterFiles, layouts: Sequence[LinearLayout], base: BaseModel, dtype: torch.dtype
) -> HostAdapter:
    """Checks a PEFT LoRA adapter, cuts it to the layouts, converts it to the dtype, and copies it to memory of its own.

    Raises AdapterInvalidError, naming the field or tensor, if it cannot be served exactly as PEFT would.
    """
    config = parse_config(files.config)
    invocation = read_invocation(config, base)
    deltas, classifier, doubts = _read(config, files, layouts, base)
    if classifier is not None and invocation is not None:
        raise AdapterInvalidError(f"{TENSORS}: an activated adapter (aLoRA) with a classifier is not served")
    adapter = partition_adapter(deltas, layouts, dtype, classifier)
    ends, wrong = end_tokens(files.text, base)
    modules = modules_in_any_form(layouts, base.architecture)
    warnings = (*find_doubts(config, base, modules), *doubts, *foreign_tokens(files.text, base), *wrong)
    if base.is_text_part and any(map(is_of_another_part, as_saved_by_peft(read_tensors(files.tensors)))):
        warnings = (*warnings, "what it adds to the part that reads pictures is not used: text alone is served")
    if files.text.error:
        warnings = (*warnings, f"conversations with it are refused: {files.text.error}")
    text = replace(files.text, end_token_ids=ends, added_tokens={})
    return replace(adapter, text=text, warnings=warnings, invocation=invocation)


def read_deltas(files: AdapterFiles, layouts: Sequence[LinearLayout], base: BaseModel) -> dict[str, Delta]:
    """Reads the whole adapter, by module, to merge it. Everything is checked except whether values are finite.

    Raises AdapterInvalidError as read_adapter does, and InvalidRequestError for a kind that PEFT does not merge.
    """
    config = parse_config(files.config)
    if config.peft_type not in _MERGED or config.use_bdlora or config.use_qalora:
        kind = "BD-LoRA" if config.use_bdlora else "QALoRA" if config.use_qalora else config.peft_type
        reason = f"only adapters of plain LoRA and (IA)3 can be merged, and one of these is of {kind}"
        raise InvalidRequestError(FieldViolation("merged_adapters.adapters", reason))
    deltas, classifier, _ = _read(config, files, layouts, base)
    if classifier is not None:
        reason = "adapters with a classifier cannot be merged: PEFT refuses modules_to_save, too"
        raise InvalidRequestError(FieldViolation("merged_adapters.adapters", reason))
    return deltas


def _read(
    config: AdapterConfig, files: AdapterFiles, layouts: Sequence[LinearLayout], base: BaseModel
) -> tuple[dict[str, Delta], Classifier | None, tuple[str, ...]]:
    """Returns the deltas, the classifier and its possible problems."""
    stored = read_tensors(files.tensors)
    if isinstance(config, MlxConfig):
        stored = in_pefts_terms(stored)
    found = as_saved_by_peft(stored, base.backbone)
    if config.model_extra and config.model_extra.get("monteclora_config"):  # its samplers only matter in training
        found = {name: own for name, own in found.items() if ".lora_monteclora_sampler." not in name}
    trained = as_trained(layouts, base.architecture, found)
    if config.use_dora and any(own is not layout for own, layout in zip(trained, layouts, strict=True)):
        raise AdapterInvalidError(
            f"adapter_config.json: use_dora: not supported for modules that this base has joined or divided: it has "
            f"{', '.join(sorted({part.module.rpartition('.')[2] for layout in layouts for part in layout.parts}))}"
        )
    parts = {part.module: (layout, part) for layout in trained for part in layout.parts}
    parameters = find_parameters(trained)
    named = _named(config, parameters)
    served = {name for name in found if not (base.is_text_part and is_of_another_part(name))}
    as_stored = {name: stored[own] for name, own in found.items() if name in served}
    classifier, doubts = read_classifier(config, as_stored, files.model_config, base)
    as_stored = {name: tensor for name, tensor in as_stored.items() if not is_of_classifier(name)}
    tensors = by_expert(as_stored, parameters, named.values())
    if isinstance(config, MlxConfig):
        targets = targets_in_file(config, tensors, parts)
    else:
        targets = _find_targets(config, tuple(parts), {name: each.modules for name, each in named.items()}, base)
        untouched = absent([each for each in parameters if each not in named.values()], tensors)
        targets = {module: target for module, target in targets.items() if module not in untouched} or targets
    tensors, targets = in_plain_terms(config, tensors, targets, parts, base)
    replaced = _check_names(tensors, targets, parts, config, base)
    if replaced and config.is_activated:
        raise AdapterInvalidError(
            f"{TENSORS}: {next(iter(replaced))}: an activated adapter (aLoRA) cannot take the place of the base's own"
            " tensors, since it would act before its invocation, too"
        )
    for module, target in targets.items():
        _check_shapes(tensors, module, target, *parts[module])
    deltas = {}
    for module in [module for module in parts if module in targets or module in replaced]:
        layout, part = parts[module]
        delta = nothing(part.out_features, layout.in_features)
        if module in targets:
            delta = Delta(tensors[name_of_a(module)], tensors[name_of_b(module)], targets[module].scale)
        deltas[module] = with_outputs(module, delta, tensors, replaced.get(module, Replaced()), base)
    return as_served(deltas, trained, layouts), classifier, doubts


def _named(config: AdapterConfig, parameters: Sequence[Parameter]) -> dict[str, Parameter]:
    """The parameters that target_parameters names, by their names in transformers."""
    found = {each.names[-1]: each for each in parameters if any(is_named(name, config) for name in each.names)}
    if config.target_parameters and not found:
        raise AdapterInvalidError(
            f"adapter_config.json: target_parameters: {', '.join(config.target_parameters)[:200]}: not supported: only "
            f"experts and their router are served so, and loraplex's own decoder computes none of these for this model"
        )
    return found


def _find_targets(
    config: AdapterConfig, modules: Sequence[str], parameters: Mapping[str, Sequence[str]], base: BaseModel
) -> dict[str, Target]:
    """Finds the targets by the modules' names or, if the configuration matches none of these, by their former names."""
    try:
        return find_targets(config, modules, parameters, base.embedding, base.head)
    except AdapterInvalidError:
        for former in former_names(modules, base.backbone):
            with suppress(AdapterInvalidError):
                return {former[name]: target for name, target in find_targets(config, tuple(former)).items()}
        raise


def _check_names(
    tensors: Mapping[str, torch.Tensor],
    targets: Mapping[str, Target],
    parts: Mapping[str, tuple[LinearLayout, LinearPart]],
    config: AdapterConfig,
    base: BaseModel,
) -> dict[str, Replaced]:
    """Checks that there are an A and a B for each target. Other tensors must be equal to the base's own, or replace
    them in linear layers. Returns the replaced ones by module."""
    kinds = [name_of_a, name_of_b]
    kinds += [name_of_magnitude] * bool(config.use_dora) + [name_of_bias] * bool(config.lora_bias)
    kinds += [name_of_factors] * isinstance(config, Ia3Config)
    expected = {name_of(module) for module in targets for name_of in kinds}
    extra = tensors.keys() - expected
    own = {name: match for name in extra if (match := _BASE_TENSOR.fullmatch(name))}
    # PEFT saves the base's embedding and lm_head with some adapters, and replaces the base's by them when it loads.
    trained = {
        name
        for name, match in own.items()
        if not base.holds(
            f"{match['module']}.{match['kind']}", tensors[name], exactly=_is_saved(match["module"], config)
        )
    }
    replaced: dict[str, Replaced] = {}
    for name in sorted(trained):
        module, kind = own[name]["module"], own[name]["kind"]
        # In other modeling code, matrices may be transposed.
        held_alike = kind == "bias" or base.served is not None
        if module in parts and held_alike and _is_loaded(own[name], targets, config, base):
            layout, part = parts[module]
            shape = {"out_features": part.out_features, "in_features": layout.in_features}
            _check_shape(tensors, name, **(shape if kind == "weight" else {"out_features": part.out_features}))
            replaced[module] = replace(replaced.get(module, Replaced()), **{kind: tensors[name]})
            trained.remove(name)
    known = tuple(f"{PREFIX}{module}." for module in parts)
    foreign = {name for name in extra - own.keys() if not name.startswith(known)}
    if heads := {name for name in foreign | trained if _CLASSIFIER.search(name)}:
        raise AdapterInvalidError(
            f"{TENSORS}: {_list(heads)}: a classifier is served that was trained whole (modules_to_save: score or "
            "classifier), no LoRA on one and no head that answers questions"
        )
    if foreign:
        raise AdapterInvalidError(
            f"{TENSORS}: no linear layer of this model fits {_list(foreign)}: the adapter was made for another base,"
            " or adapts more than linear layers"
        )
    if trained:
        raise AdapterInvalidError(
            f"{TENSORS}: {_list(trained)}: these differ from the model's own weights: the adapter was made for another"
            " base, or contains whole tensors, which is not supported"
        )
    if extra := extra - own.keys():
        raise AdapterInvalidError(f"{TENSORS}: adapter_config.json does not call for {_list(extra)}")
    whole = {match["module"] for match in own.values() if match["kind"] == "weight"}
    expected |= {f"{PREFIX}{module}.weight" for module in parts if _is_saved(module, config) and module not in whole}
    if missing := expected - tensors.keys():
        raise AdapterInvalidError(f"{TENSORS}: missing {_list(missing)}, which adapter_config.json calls for")
    return replaced


def _is_loaded(name: re.Match[str], targets: Mapping[str, Target], config: AdapterConfig, base: BaseModel) -> bool:
    """Whether PEFT replaces the base's tensor by this one, and only that tensor. An lm head that is tied to the
    embedding stays tied unless modules_to_save has it."""
    module, wrapper = name["module"], name["wrapper"] or ""
    if _is_saved(module, config):
        return wrapper not in (".base_layer", ".original_module")
    tied = base.served is not None and base.served.tied and module == base.head
    return wrapper == (".base_layer" if module in targets else "") and not tied


def _is_saved(module: str, config: AdapterConfig) -> bool:
    return any(module.endswith(each) for each in config.modules_to_save or ())


def _list(names: set[str]) -> str:
    shown = ", ".join(name[:200] for name in sorted(names)[:_SHOWN_NAMES])
    return f"{shown} and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else shown


def _check_shapes(
    tensors: Mapping[str, torch.Tensor], module: str, target: Target, layout: LinearLayout, part: LinearPart
) -> None:
    lora_rank, inputs, outputs = target.lora_rank, layout.in_features, part.out_features
    _check_shape(tensors, name_of_a(module), lora_rank=lora_rank, in_features=inputs)
    _check_shape(tensors, name_of_b(module), out_features=outputs, lora_rank=lora_rank)
    for name in name_of_bias(module), name_of_magnitude(module):
        if name in tensors:
            _check_shape(tensors, name, out_features=outputs)


def _check_shape(tensors: Mapping[str, torch.Tensor], name: str, **dimensions: int) -> None:
    shape, expected = list(tensors[name].shape), list(dimensions.values())
    if shape == expected:
        return
    if len(shape) != len(expected):
        kind = "a matrix" if len(expected) == 2 else "a vector"
        raise AdapterInvalidError(f"{TENSORS}: {name} is {shape}, not {kind}")
    wrong = {label: size for (label, size), found in zip(dimensions.items(), shape, strict=True) if size != found}
    reason = "adapter_config.json says so" if "lora_rank" in wrong else "the adapter was made for another base"
    needed = " and ".join(f"{label} {size}" for label, size in wrong.items())
    raise AdapterInvalidError(f"{TENSORS}: {name} is {shape}, not {expected}: it needs {needed}: {reason}")
