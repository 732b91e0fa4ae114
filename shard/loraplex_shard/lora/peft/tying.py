"""What PEFT makes of a configuration where the lm head is the embedding: with ensure_weight_tying, what is done to one
of the two is done to both."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.config import AdapterConfig
from loraplex_shard.lora.peft.kinds import TrainableTokensConfig
from loraplex_shard.lora.peft.patterns import matching_names
from loraplex_shard.lora.peft.targets import find_targets

_NAMES = ("embed_tokens", "lm_head")  # that PEFT takes for an embedding or its head


@dataclass(frozen=True, slots=True)
class Tying:
    config: AdapterConfig  # what PEFT makes of it
    saved: bool = False  # modules_to_save has the embedding, and the head's copy is the embedding's
    targets: bool = False  # the head's A and B are the embedding's B and A


def tie(config: AdapterConfig, base: BaseModel) -> Tying:
    """As LoraModel._check_tied_modules changes a configuration when an adapter is loaded."""
    if not config.ensure_weight_tying or base.served is None or not base.served.tied:
        return Tying(config)
    saved, targets = config.modules_to_save or [], config.target_modules
    if any(name.rpartition(".")[2] in _NAMES for name in saved):
        named = saved if base.embedding in saved else [*saved, base.embedding]
        return Tying(config.model_copy(update={"modules_to_save": _without_head(named, base)}), saved=True)
    if isinstance(targets, str):
        if not matching_names("target_modules", [targets], _NAMES)[0]:
            return Tying(config)
        both = rf"(?:{targets}|^{re.escape(base.embedding)}$|^{re.escape(base.head)}$)"
        return Tying(config.model_copy(update={"target_modules": both}), targets=True)
    if not any(name.rpartition(".")[2] in _NAMES for name in targets or []):
        return Tying(config)
    named = [*_without_head([*dict.fromkeys([*(targets or []), base.embedding])], base), base.head]
    return Tying(config.model_copy(update={"target_modules": named}), targets=True)


def token_indices(config: AdapterConfig, base: BaseModel) -> dict[str, list[int]]:
    """The tokens that are trained by themselves, by module. Where the embedding's are the head's as well, both have
    them. Raises AdapterInvalidError for modules that PEFT would not find, or that are neither of the two."""
    given = config.trainable_token_indices
    if given is None:
        return {}
    if isinstance(config, TrainableTokensConfig):
        given = dict.fromkeys(_targets_of(config, base), config.trainable_token_indices)
    found = dict[str, list[int]]()
    for key, tokens in (given if isinstance(given, dict) else {base.embedding: given}).items():
        modules = [module for module in (base.embedding, base.head) if module.endswith(key)]
        if not modules:
            raise AdapterInvalidError(
                f"adapter_config.json: trainable_token_indices: {key[:100]!r} is not supported: only the embedding"
                f" ({base.embedding}) and the lm head ({base.head}) have tokens"
            )
        found |= dict.fromkeys(modules, tokens)
    if base.served is not None and base.served.tied and base.embedding in found:
        own = found.get(base.head, found[base.embedding])
        if config.ensure_weight_tying and own != found[base.embedding]:
            raise AdapterInvalidError(
                "adapter_config.json: trainable_token_indices: the embedding and the lm head have different tokens,"
                " which ensure_weight_tying does not allow"
            )
        found[base.head] = own
    return found


def _targets_of(config: TrainableTokensConfig, base: BaseModel) -> Iterable[str]:
    if config.target_modules is None:
        return [base.embedding]
    return find_targets(config, (base.head,), embedding=base.embedding, head=base.head)


def _without_head(names: list[str], base: BaseModel) -> list[str]:
    """Without the first that means the head."""
    meant = matching_names("modules", [rf"(^|.*\.){name}($|\..*)" for name in names], [base.head])
    first = next((place for place, matched in enumerate(meant) if matched), None)
    return [name for place, name in enumerate(names) if place != first]
