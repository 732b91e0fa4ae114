"""Reads an adapter's files into the weights that this rank's layers use. Knows nothing about sources, slots or devices.

Every rank checks the whole adapter before it cuts its part, so all ranks refuse the same adapters.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from loraplex_protos.errors import AdapterInvalidError, FieldViolation, InvalidRequestError
from loraplex_shard.lora.peft import own_tokens
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
from loraplex_shard.lora.peft.shapes import check_shape, listed
from loraplex_shard.lora.peft.special_tokens import end_tokens, foreign_tokens
from loraplex_shard.lora.peft.targets import Target, find_targets, is_named
from loraplex_shard.lora.peft.tensor_names import PREFIX, as_saved_by_peft, former_names, is_of_another_part
from loraplex_shard.lora.peft.tensors import read_tensors
from loraplex_shard.lora.peft.tying import tie, token_indices
from loraplex_shard.lora.peft.vocabulary import read_vocabulary
from loraplex_shard.lora.sources.files import TENSORS, AdapterFiles
from loraplex_shard.lora.sources.model_config import ModelConfig
from loraplex_shard.lora.weights.deltas import Delta, HostAdapter, name_of_a, name_of_b, partition_adapter
from loraplex_shard.lora.weights.own import own_weights
from loraplex_shard.shapes.classifier import Classifier
from loraplex_shard.shapes.layout import LinearLayout, LinearPart

_MERGED = frozenset({"LORA", "IA3", "MLX-LM"})
# The names under which PEFT saves the base's own tensors with some adapters.
_BASE_TENSOR = re.compile(
    re.escape(PREFIX)
    + r"(?P<module>(?:(?!\.lora_).)+?)(?P<wrapper>\.base_layer|\.original_module|\.modules_to_save(?:\.[^.]+)?)?"
    r"\.(?P<kind>weight|bias)"
)
_ROUTER = re.compile(r"\.(gate|router)\.lora_[AB]\b")
_CLASSIFIER = re.compile(r"\.(score|classifier|qa_outputs)\.")  # transformers' names for other heads


def read_adapter(
    files: AdapterFiles,
    layouts: Sequence[LinearLayout],
    base: BaseModel,
    dtype: torch.dtype,
    limit: int = sys.maxsize,
) -> HostAdapter:
    """Checks a PEFT LoRA adapter, cuts it to the layouts, converts it to the dtype, and copies it to memory of its own.

    Raises AdapterInvalidError, naming the field or tensor, if it cannot be served exactly as PEFT would, or if it takes
    more than `limit` bytes as LoRA.
    """
    config = parse_config(files.config)
    invocation = read_invocation(config, base)
    whole = _read(config, files, layouts, base, limit)
    if whole.classifier is not None and invocation is not None:
        raise AdapterInvalidError(f"{TENSORS}: an activated adapter (aLoRA) with a classifier is not served")
    adapter = cut_adapter(whole, layouts, base, dtype)
    head = adapter.weights.own.head
    vocabulary = own_tokens.read_vocabulary(files.text, base, base.vocab_size if head is None else head.vocab_size)
    own = {id for id, _ in vocabulary.own}
    ends, wrong = end_tokens(files.text, base, vocabulary)
    modules = modules_in_any_form(layouts, base.architecture)
    warnings = (*find_doubts(config, base, modules), *whole.doubts, *foreign_tokens(files.text, base, own), *wrong)
    if base.is_text_part and any(map(is_of_another_part, as_saved_by_peft(read_tensors(files.tensors)))):
        warnings = (*warnings, "what it adds to the part that reads pictures is not used: text alone is served")
    if unused := {name for name in as_saved_by_peft(read_tensors(files.tensors)) if _is_unused(name, base)}:
        warnings = (*warnings, f"{listed(unused)}: not used, as in PEFT: the model's code does not call these layers")
    if files.text.error:
        warnings = (*warnings, f"conversations with it are refused: {files.text.error}")
    text = replace(files.text, end_token_ids=ends, added_tokens={})
    held = replace(adapter, text=text, warnings=warnings, invocation=invocation)
    size = 0 if vocabulary.size == base.vocab_size else vocabulary.size
    return replace(held, tokenizer_json=vocabulary.tokenizer_json, vocab_size=size)


def read_deltas(files: AdapterFiles, layouts: Sequence[LinearLayout], base: BaseModel) -> dict[str, Delta]:
    """Reads the whole adapter, by module, to merge it. Everything is checked except whether values are finite.

    Raises AdapterInvalidError as read_adapter does, and InvalidRequestError for a kind that PEFT does not merge.
    """
    config = parse_config(files.config)
    if config.peft_type not in _MERGED or config.use_bdlora or config.use_qalora:
        kind = "BD-LoRA" if config.use_bdlora else "QALoRA" if config.use_qalora else config.peft_type
        reason = f"only adapters of plain LoRA and (IA)3 can be merged, and one of these is of {kind}"
        raise InvalidRequestError(FieldViolation("merged_adapters.adapters", reason))
    whole = _read(config, files, layouts, base)
    if whole.classifier is not None or whole.norms:
        reason = f"adapters with {'norms' if whole.norms else 'a classifier'} cannot be merged: PEFT refuses"
        reason += " modules_to_save, too"
        raise InvalidRequestError(FieldViolation("merged_adapters.adapters", reason))
    return whole.deltas


def _is_unused(name: str, base: BaseModel) -> bool:
    """Whether a tensor, by PEFT's name, adds to the output of a layer that is never called."""
    return any(name.startswith(f"{PREFIX}{module}.lora_") for module in base.uncalled)


@dataclass(frozen=True, slots=True)
class WholeAdapter:
    """An adapter before it is cut for a rank."""

    deltas: dict[str, Delta]  # by module
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict)  # in place of the base's, by name
    classifier: Classifier | None = None
    doubts: tuple[str, ...] = ()  # what may be wrong with it


def cut_adapter(
    whole: WholeAdapter, layouts: Sequence[LinearLayout], base: BaseModel, dtype: torch.dtype
) -> HostAdapter:
    """Cuts an adapter to the layouts, with what it has outside them. Raises AdapterInvalidError as partition_adapter
    does."""
    if base.served is None:
        return partition_adapter(whole.deltas, layouts, dtype, whole.classifier)
    norms = base.served.read_norms(whole.norms) if whole.norms else ()
    own = own_weights(whole.deltas, norms, layouts, base.served.vocabulary)
    return partition_adapter(whole.deltas, layouts, dtype, whole.classifier, own)


def _read(
    config: AdapterConfig,
    files: AdapterFiles,
    layouts: Sequence[LinearLayout],
    base: BaseModel,
    limit: int = sys.maxsize,
) -> WholeAdapter:
    return _understand(config, read_tensors(files.tensors), files.model_config, layouts, base, limit)


def check_shapes(
    config: AdapterConfig, shapes: dict[str, torch.Tensor], layouts: Sequence[LinearLayout], base: BaseModel
) -> None:
    """Raises AdapterInvalidError for what can be seen to be wrong with an adapter without the values of its tensors,
    which are on the meta device: those that are missing, too many, or of a wrong shape. Only of plain LoRA and DoRA."""
    plain = config.peft_type == "LORA" and not (config.use_bdlora or config.use_qalora)
    if plain and not any(map(is_of_classifier, as_saved_by_peft(shapes, base.backbone))):
        _understand(config, shapes, ModelConfig(), layouts, base, sys.maxsize)


def _understand(
    config: AdapterConfig,
    stored: dict[str, torch.Tensor],
    model_config: ModelConfig,
    layouts: Sequence[LinearLayout],
    base: BaseModel,
    limit: int,
) -> WholeAdapter:
    tying = tie(config, base)
    config, tokens = tying.config, token_indices(config, base)
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
    served = {name for name in served if not _is_unused(name, base)}
    as_stored = {name: stored[own] for name, own in found.items() if name in served}
    classifier, doubts = read_classifier(config, as_stored, model_config, base)
    as_stored = {name: tensor for name, tensor in as_stored.items() if not is_of_classifier(name)}
    tensors = by_expert(as_stored, parameters, named.values())
    if isinstance(config, MlxConfig):
        targets = targets_in_file(config, tensors, parts)
    else:
        targets = _find_targets(config, tuple(parts), {name: each.modules for name, each in named.items()}, base)
        untouched = absent([each for each in parameters if each not in named.values()], tensors)
        targets = {module: target for module, target in targets.items() if module not in untouched} or targets
    if base.embedding in targets and (refusal := _embedding_refusal(config, base)):
        raise AdapterInvalidError(f"adapter_config.json: target_modules: {base.embedding}: {refusal}")
    of_embedding = {module: targets.pop(module) for module in (base.embedding,) if module in targets}
    tensors, targets = in_plain_terms(config, tensors, targets, parts, base, limit)
    deltas = dict[str, Delta]()
    if base.served is None and tokens:
        raise AdapterInvalidError("adapter_config.json: trainable_token_indices: not served on this architecture")
    if base.served is not None:
        ends = [base.embedding]
        if base.head in parts and not isinstance(config, Ia3Config):
            ends.append(base.head)
            of_embedding |= {module: targets.pop(module) for module in (base.head,) if module in targets}
            parts.pop(base.head)
        starts = tuple(f"{PREFIX}{module}." for module in ends)
        of_ends = {name: tensor for name, tensor in tensors.items() if name.startswith(starts)}
        deltas = read_vocabulary(of_ends, of_embedding, tokens, tying, base, base.head in ends)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in of_ends}
    replaced, norms = _check_names(tensors, targets, parts, config, base)
    own = [module for module, delta in deltas.items() if delta.own is not None or module == base.embedding]
    if config.is_activated and (everywhere := [*replaced, *norms, *own]):
        raise AdapterInvalidError(
            f"{TENSORS}: {everywhere[0]}: an activated adapter (aLoRA) cannot take the place of the base's own"
            " tensors, since it would act before its invocation, too"
        )
    for module, target in targets.items():
        _check_shapes(tensors, module, target, *parts[module])
    for module in [module for module in parts if module in targets or module in replaced]:
        layout, part = parts[module]
        delta = nothing(part.out_features, layout.in_features)
        if module in targets:
            delta = Delta(tensors[name_of_a(module)], tensors[name_of_b(module)], targets[module].scale)
        deltas[module] = with_outputs(module, delta, tensors, replaced.get(module, Replaced()), base)
    of_layers = as_served(deltas, trained, layouts)
    of_layers |= {module: delta for module, delta in deltas.items() if module == base.embedding}
    return WholeAdapter(of_layers, norms, classifier, doubts)


def _embedding_refusal(config: AdapterConfig, base: BaseModel) -> str:
    """Why an adapted embedding is not served; empty if it is."""
    if base.served is None:
        return "an adapted embedding is not served on this architecture"
    if config.lora_bias:
        return "PEFT has no lora_bias for embeddings"
    if config.peft_type != "LORA" or config.use_bdlora or config.use_qalora:
        return "an embedding can only be adapted by plain LoRA or DoRA"
    return ""


def _named(config: AdapterConfig, parameters: Sequence[Parameter]) -> dict[str, Parameter]:
    """The parameters that target_parameters names, by their names in transformers."""
    found = {each.names[-1]: each for each in parameters if any(is_named(name, config) for name in each.names)}
    if config.target_parameters and not found:
        raise AdapterInvalidError(
            f"adapter_config.json: target_parameters: {', '.join(config.target_parameters)[:200]}: not supported: only "
            f"experts and their router are served so, and this model has none of these in a form that can be adapted"
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
) -> tuple[dict[str, Replaced], dict[str, torch.Tensor]]:
    """Checks that there are an A and a B for each target. Other tensors must be equal to the base's own, or replace
    them. Returns the replaced ones of linear layers by module, and those of norms by name."""
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
    norms: dict[str, torch.Tensor] = {}
    shapes = {} if base.served is None else base.served.norms
    for name in sorted(trained):
        module, kind = own[name]["module"], own[name]["kind"]
        # In other modeling code, matrices may be transposed.
        held_alike = kind == "bias" or base.served is not None
        if module in parts and held_alike and _is_loaded(own[name], targets, config):
            layout, part = parts[module]
            shape = {"out_features": part.out_features, "in_features": layout.in_features}
            check_shape(tensors, name, **(shape if kind == "weight" else {"out_features": part.out_features}))
            replaced[module] = replace(replaced.get(module, Replaced()), **{kind: tensors[name]})
            trained.remove(name)
        elif (tensor := f"{module}.{kind}") in shapes and _is_loaded(own[name], targets, config):
            check_shape(tensors, name, **{f"dimension {place}": size for place, size in enumerate(shapes[tensor])})
            norms[tensor] = tensors[name]
            trained.remove(name)
    known = tuple(f"{PREFIX}{module}." for module in parts)
    foreign = {name for name in extra - own.keys() if not name.startswith(known)}
    if heads := {name for name in foreign | trained if _CLASSIFIER.search(name)}:
        raise AdapterInvalidError(
            f"{TENSORS}: {listed(heads)}: a classifier is served that was trained whole (modules_to_save: score or "
            "classifier), no LoRA on one and no head that answers questions"
        )
    has_experts = any(layout.of_expert for layout, _ in parts.values())
    if routers := {name for name in foreign if has_experts and _ROUTER.search(name)}:
        raise AdapterInvalidError(
            f"{TENSORS}: {listed(routers)}: routers of experts take no adapter where transformers' code computes the "
            "model: train without them (PEFT's all-linear includes them: name the target_modules)"
        )
    if foreign:
        raise AdapterInvalidError(
            f"{TENSORS}: no linear layer of this model fits {listed(foreign)}: the adapter was made for another base,"
            " or adapts more than linear layers"
        )
    if trained:
        raise AdapterInvalidError(
            f"{TENSORS}: {listed(trained)}: these differ from the model's own weights: the adapter was made for another"
            " base, or contains whole tensors, which is not supported"
        )
    if extra := extra - own.keys():
        raise AdapterInvalidError(f"{TENSORS}: adapter_config.json does not call for {listed(extra)}")
    whole = {f"{match['module']}.{match['kind']}" for match in own.values()}
    called = {f"{module}.weight" for module in parts} | shapes.keys()
    expected |= {f"{PREFIX}{name}" for name in called - whole if _is_saved(name.rpartition(".")[0], config)}
    if missing := expected - tensors.keys():
        raise AdapterInvalidError(f"{TENSORS}: missing {listed(missing)}, which adapter_config.json calls for")
    return replaced, norms


def _is_loaded(name: re.Match[str], targets: Mapping[str, Target], config: AdapterConfig) -> bool:
    """Whether PEFT replaces the base's tensor by this one."""
    module, wrapper = name["module"], name["wrapper"] or ""
    if _is_saved(module, config):
        return wrapper not in (".base_layer", ".original_module")
    return wrapper == (".base_layer" if module in targets else "")


def _is_saved(module: str, config: AdapterConfig) -> bool:
    """Whether modules_to_save has it, or a module that it is a part of."""
    parts = module.split(".")
    holders = [".".join(parts[: length + 1]) for length in range(len(parts))]
    return any(holder.endswith(each) for each in config.modules_to_save or () for holder in holders)


def _check_shapes(
    tensors: Mapping[str, torch.Tensor], module: str, target: Target, layout: LinearLayout, part: LinearPart
) -> None:
    lora_rank, inputs, outputs = target.lora_rank, layout.in_features, part.out_features
    check_shape(tensors, name_of_a(module), lora_rank=lora_rank, in_features=inputs)
    check_shape(tensors, name_of_b(module), out_features=outputs, lora_rank=lora_rank)
    for name in name_of_bias(module), name_of_magnitude(module):
        if name in tensors:
            check_shape(tensors, name, out_features=outputs)
