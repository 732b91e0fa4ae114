"""What an adapter's tensors mean by its configuration: the whole adapter, by module, as PEFT understands it."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft import gguf, tinker
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.classifiers import adapted_classifier, is_of_classifier, read_classifier, with_lora
from loraplex_shard.lora.peft.config import AdapterConfig
from loraplex_shard.lora.peft.experts import Parameter, absent, by_expert, find_parameters
from loraplex_shard.lora.peft.forms import as_served, as_trained
from loraplex_shard.lora.peft.gguf import GgufConfig
from loraplex_shard.lora.peft.kinds import Ia3Config, TrainableTokensConfig
from loraplex_shard.lora.peft.mlx import MlxConfig, in_pefts_terms, targets_in_file
from loraplex_shard.lora.peft.named_tensors import check_lora_shapes, check_names, doubts_about_biases
from loraplex_shard.lora.peft.outputs import Replaced, nothing, with_outputs
from loraplex_shard.lora.peft.products import in_plain_terms
from loraplex_shard.lora.peft.targets import Target, find_targets, is_named
from loraplex_shard.lora.peft.tensor_names import (
    PREFIX,
    as_saved_by_peft,
    below_adapters_of_tokens,
    former_names,
    is_of_another_part,
)
from loraplex_shard.lora.peft.tying import tie, token_indices
from loraplex_shard.lora.peft.vocabulary import read_vocabulary
from loraplex_shard.lora.sources.files import TENSORS
from loraplex_shard.lora.sources.model_config import ModelConfig
from loraplex_shard.lora.weights.deltas import Delta, name_of_a, name_of_b
from loraplex_shard.shapes.classifier import Classifier
from loraplex_shard.shapes.layout import LinearLayout


def is_unused(name: str, base: BaseModel) -> bool:
    """Whether a tensor, by PEFT's name, adds to the output of a layer that is never called."""
    return any(name.startswith(f"{PREFIX}{module}.lora_") for module in base.uncalled)


@dataclass(frozen=True, slots=True)
class WholeAdapter:
    """An adapter before it is cut for a rank."""

    deltas: dict[str, Delta]  # by module
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict)  # in place of the base's, by name
    classifier: Classifier | None = None
    doubts: tuple[str, ...] = ()  # what may be wrong with it


def understand(
    config: AdapterConfig,
    stored: dict[str, torch.Tensor],
    model_config: ModelConfig,
    layouts: Sequence[LinearLayout],
    base: BaseModel,
    limit: int,
) -> WholeAdapter:
    """`stored`: the tensors of the file, maybe on the meta device. Raises AdapterInvalidError, naming the field or
    tensor, if it cannot be served exactly as PEFT would, or if it takes more than `limit` bytes as LoRA."""
    config, stored = tinker.in_pefts_terms(config, stored, base)
    tying = tie(config, base)
    config, tokens = tying.config, token_indices(config, base)
    if isinstance(config, MlxConfig):
        stored = in_pefts_terms(stored)
    if isinstance(config, GgufConfig):
        stored = gguf.in_pefts_terms(stored, config, [part.module for own in layouts for part in own.parts], base)
    found = as_saved_by_peft(stored, base.backbone)
    if isinstance(config, TrainableTokensConfig):
        found = below_adapters_of_tokens(found)
    if config.model_extra and config.model_extra.get("monteclora_config"):  # its samplers only matter in training
        found = {name: own for name, own in found.items() if ".lora_monteclora_sampler." not in name}
    trained = as_trained(layouts, base.architecture, found)
    if config.use_dora and any(own is not layout for own, layout in zip(trained, layouts, strict=True)):
        raise AdapterInvalidError(
            f"adapter_config.json: use_dora: not supported for modules that this base has joined or divided: it has "
            f"{', '.join(sorted({part.module.rpartition('.')[2] for layout in layouts for part in layout.parts}))}"
        )
    parts = {part.module: (layout, part) for layout in trained for part in layout.parts}
    classifiers = adapted_classifier(config, found, base)
    parts |= classifiers
    parameters = find_parameters(trained)
    named = _named(config, parameters)
    served = {name for name in found if not (base.is_text_part and is_of_another_part(name))}
    served = {name for name in served if not is_unused(name, base)}
    as_stored = {name: stored[own] for name, own in found.items() if name in served}
    classifier, doubts = read_classifier(config, as_stored, model_config, base)
    as_stored = {name: tensor for name, tensor in as_stored.items() if not is_of_classifier(name)}
    tensors = by_expert(as_stored, parameters, named.values())
    if isinstance(config, MlxConfig):
        targets = targets_in_file(config, tensors, parts)
    elif isinstance(config, TrainableTokensConfig):
        targets = {}
    elif isinstance(config, GgufConfig):
        targets = gguf.targets_in_file(config, tensors, (*parts, base.embedding))
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
    replaced, norms = check_names(tensors, targets, parts, config, base)
    doubts += doubts_about_biases(tensors, targets, parts, config, base)
    own = [module for module, delta in deltas.items() if delta.own is not None or module == base.embedding]
    if config.is_activated and (everywhere := [*replaced, *norms, *own]):
        raise AdapterInvalidError(
            f"{TENSORS}: {everywhere[0]}: an activated adapter (aLoRA) cannot take the place of the base's own"
            " tensors, since it would act before its invocation, too"
        )
    for module, target in targets.items():
        check_lora_shapes(tensors, module, target, *parts[module])
    for module in [module for module in parts if module in targets or module in replaced]:
        layout, part = parts[module]
        delta = nothing(part.out_features, layout.in_features)
        if module in targets:
            delta = Delta(tensors[name_of_a(module)], tensors[name_of_b(module)], targets[module].scale)
        if module in classifiers:
            if classifier is not None:
                raise AdapterInvalidError(f"{TENSORS}: {module}: LoRA on one classifier beside another, trained whole")
            classifier = with_lora(module, delta, tensors, base)
            continue
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
    if config.peft_type not in ("LORA", "GGUF") or config.use_bdlora or config.use_qalora:
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
