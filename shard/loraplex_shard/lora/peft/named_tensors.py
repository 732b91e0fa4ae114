"""Which tensors an adapter must have by its configuration, and which of the base's own it replaces."""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace

import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.config import AdapterConfig
from loraplex_shard.lora.peft.kinds import Ia3Config
from loraplex_shard.lora.peft.outputs import (
    Replaced,
    name_of_bias,
    name_of_factors,
    name_of_magnitude,
)
from loraplex_shard.lora.peft.shapes import check_shape, listed
from loraplex_shard.lora.peft.targets import Target
from loraplex_shard.lora.peft.tensor_names import PREFIX
from loraplex_shard.lora.sources.files import TENSORS
from loraplex_shard.lora.weights.deltas import name_of_a, name_of_b
from loraplex_shard.shapes.layout import LinearLayout, LinearPart

# The names under which PEFT saves the base's own tensors with some adapters.
_BASE_TENSOR = re.compile(
    re.escape(PREFIX)
    + r"(?P<module>(?:(?!\.lora_).)+?)(?P<wrapper>\.base_layer|\.original_module|\.modules_to_save(?:\.[^.]+)?)?"
    r"\.(?P<kind>weight|bias)"
)
_ROUTER = re.compile(r"\.(gate|router)\.lora_[AB]\b")
_CLASSIFIER = re.compile(r"\.(score|classifier|qa_outputs)\.")  # transformers' names for other heads


def check_names(
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
        held_alike = kind == "bias" or (base.served is not None and module not in base.served.transposed)
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
            "classifier), or LoRA on the classifier of a model that has one, as PEFT trains it without the task_type "
            "SEQ_CLS or TOKEN_CLS; no head that answers questions"
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
    held = frozenset[str]() if base.tensors is None else base.tensors.names
    biases = {f"{module}.bias" for module in parts} & held
    called = {f"{module}.weight" for module in parts} | biases | shapes.keys()
    expected |= {f"{PREFIX}{name}" for name in called - whole if _is_saved(name.rpartition(".")[0], config)}
    if missing := expected - tensors.keys():
        raise AdapterInvalidError(f"{TENSORS}: missing {listed(missing)}, which adapter_config.json calls for")
    return replaced, norms


def doubts_about_biases(
    tensors: Iterable[str], targets: Container[str], parts: Iterable[str], config: AdapterConfig, base: BaseModel
) -> tuple[str, ...]:
    """What may be wrong with the base's biases that the configuration calls trained. Former versions of PEFT did not
    save any. Raises AdapterInvalidError if only some of them are missing."""
    if config.bias not in ("all", "lora_only") or base.tensors is None:
        return ()
    trained = {module for module in parts if config.bias == "all" or module in targets}
    expected = {module for module in trained if f"{module}.bias" in base.tensors.names}
    given = {match["module"] for name in tensors if (match := _BASE_TENSOR.fullmatch(name)) and match["kind"] == "bias"}
    missing = expected - given
    if missing and missing != expected:
        names = listed({f"{PREFIX}{module}{'.base_layer' * (module in targets)}.bias" for module in missing})
        raise AdapterInvalidError(f"{TENSORS}: missing {names}, which adapter_config.json calls for (bias)")
    return (f"bias: {config.bias}, but its file has no biases: the model's are used, as in PEFT",) if missing else ()


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


def check_lora_shapes(
    tensors: Mapping[str, torch.Tensor], module: str, target: Target, layout: LinearLayout, part: LinearPart
) -> None:
    """Raises AdapterInvalidError if a tensor of this target has another shape than the module asks for."""
    lora_rank, inputs, outputs = target.lora_rank, layout.in_features, part.out_features
    check_shape(tensors, name_of_a(module), lora_rank=lora_rank, in_features=inputs)
    check_shape(tensors, name_of_b(module), out_features=outputs, lora_rank=lora_rank)
    for name in name_of_bias(module), name_of_magnitude(module):
        if name in tensors:
            check_shape(tensors, name, out_features=outputs)
