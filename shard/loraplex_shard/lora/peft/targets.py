"""Finds the modules that an adapter's config targets, with their lora_rank and scale, by PEFT's rules. Knows nothing
about tensors."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import TypeVar

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.base import EMBEDDING, HEAD
from loraplex_shard.lora.peft.config import DEFAULT_TARGETS, AdapterConfig
from loraplex_shard.lora.peft.patterns import matching_names

_PLAIN_NAME = re.compile(r"[\w.]+", re.ASCII)

Value = TypeVar("Value", int, float)


@dataclass(frozen=True, slots=True)
class Target:
    """What an adapter adds to a module: scale * B(A x), where A is [lora_rank, in_features]."""

    lora_rank: int
    scale: float


def find_targets(
    config: AdapterConfig,
    modules: Sequence[str],
    parameters: Mapping[str, Sequence[str]] = MappingProxyType({}),
    embedding: str = EMBEDDING,
    head: str = HEAD,
) -> dict[str, Target]:
    """Returns the targets among the model's linear modules and its embedding, by name. `embedding` and `head` are
    names of modules as well.

    `parameters` has those that target_parameters names, and the modules that each of them stands for. Raises
    AdapterInvalidError if there are no targets.
    """
    names = (*modules, embedding)
    targeted = _targeted(config, names, {embedding, head}) - _excluded(config, names)
    if not targeted and not parameters:
        raise AdapterInvalidError(
            "adapter_config.json: target_modules matches no linear layer of this model: the adapter was made for"
            f" another base (this one has {', '.join(sorted({name.rpartition('.')[2] for name in modules}))})"
        )
    whole = {module for own in parameters.values() for module in own}
    found = [*(module for module in names if module in targeted and module not in whole), *parameters]
    lora_ranks = _by_pattern("rank_pattern", config.rank_pattern or {}, config.r, found)
    alphas = _by_pattern("alpha_pattern", config.alpha_pattern or {}, config.lora_alpha, found)
    targets = {name: Target(lora_ranks[name], config.scale(lora_ranks[name], alphas[name])) for name in found}
    return {module: target for name, target in targets.items() for module in parameters.get(name, (name,))}


def is_named(parameter: str, config: AdapterConfig) -> bool:
    """Whether target_parameters has the name, or an ending of it that follows a dot."""
    return _is_listed(parameter, frozenset(config.target_parameters or ()))


def unmatched_targets(config: AdapterConfig, modules: Sequence[str]) -> list[str]:
    """The target_modules that match neither a linear layer of the model nor a module that is trained whole. PEFT
    accepts them, too."""
    listed = config.target_modules if isinstance(config.target_modules, list) else []
    return sorted(set(listed) - _endings(tuple(modules)) - set(config.modules_to_save or ()))


@lru_cache(maxsize=4)
def _endings(names: tuple[str, ...]) -> frozenset[str]:
    """Each name, and every ending of it that follows a dot."""
    parts = [name.split(".") for name in names]
    return frozenset(".".join(each[start:]) for each in parts for start in range(len(each)))


def _targeted(config: AdapterConfig, names: Sequence[str], ends: set[str]) -> frozenset[str]:
    """The names that target_modules matches. `ends` are the embedding and the lm head."""
    modules = config.target_modules
    if modules is None:
        modules = [] if config.target_parameters else list(DEFAULT_TARGETS)
    if isinstance(modules, list):
        listed = frozenset(modules)  # layers_to_transform does not apply to a module that is listed by its full name
        ending = frozenset(name for name in names if _is_listed(name, listed) and _is_transformed(config, name))
        return ending | listed.intersection(names)
    if modules.lower() == "all-linear":
        return frozenset(names) - ends
    return matching_names("target_modules", [modules], names)[0]


def _excluded(config: AdapterConfig, names: Sequence[str]) -> frozenset[str]:
    saved = [rf"(.*\.)?(?:{module})(\..*)?" for module in config.modules_to_save or ()]
    whole = frozenset[str]().union(*matching_names("modules_to_save", saved, names))
    modules = config.exclude_modules
    if not modules:
        return whole
    if isinstance(modules, list):
        listed = frozenset(modules)
        return whole.union(name for name in names if _is_listed(name, listed))
    return whole | matching_names("exclude_modules", [modules], names)[0]


def _is_listed(name: str, modules: frozenset[str]) -> bool:
    """Whether the list has the name, or an ending of it that follows a dot."""
    parts = name.split(".")
    return not modules.isdisjoint(".".join(parts[start:]) for start in range(len(parts)))


def _is_transformed(config: AdapterConfig, name: str) -> bool:
    """Whether layers_to_transform has the name's layer index, or is not given."""
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    indices = [layers] if isinstance(layers, int) else layers
    index = _layer_index(name, _layer_patterns(config))
    return index is not None and index in indices


def _layer_patterns(config: AdapterConfig) -> list[str]:
    patterns = config.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        if not _PLAIN_NAME.fullmatch(pattern):
            raise AdapterInvalidError(
                f"adapter_config.json: layers_pattern: {pattern[:100]!r} is not the name of a list of layers"
            )
    return patterns


def _layer_index(name: str, patterns: list[str]) -> int | None:
    """The number after the first pattern that the name contains; without patterns, the number after the first dotted
    name.
    """
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    for expression in expressions:
        if match := re.match(expression, name):
            return int(match[1])
    return None


def _by_pattern(field: str, patterns: Mapping[str, Value], default: Value, names: Sequence[str]) -> dict[str, Value]:
    """Each name's value: that of the first pattern that matches the name or an ending of it that follows a dot."""
    matched = matching_names(field, [rf"(.*\.)?({pattern})" for pattern in patterns], names)
    values = dict.fromkeys(names, default)
    for value, matching in reversed(list(zip(patterns.values(), matched, strict=True))):
        values.update(dict.fromkeys(matching, value))
    return values
