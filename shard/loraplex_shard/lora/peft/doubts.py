"""Possible problems of an adapter that can be served, above all that it was made for another model."""

import re
from collections.abc import Sequence

from loraplex_shard.lora.peft import base_names
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.config import CLASSIFIERS, AdapterConfig
from loraplex_shard.lora.peft.targets import unmatched_targets

CLASSIFYING = ("SEQ_CLS", "TOKEN_CLS")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHOWN = 10


def find_doubts(config: AdapterConfig, base: BaseModel, modules: Sequence[str]) -> tuple[str, ...]:
    """A sentence for each problem, to be shown to the adapter's owner. `modules` are the base's linear layers."""
    found = _about_the_base(config, base)
    classifier = () if base.classifier is None else CLASSIFIERS
    if names := unmatched_targets(config, (*modules, base.embedding, *classifier)):
        found.append(f"target_modules: this model has no {_listed(names)}")
    if config.invocation_string is not None and config.alora_invocation_tokens is None:
        found.append("invocation_string: it acts from the second token of that on, as in the library that wrote it")
    if names := config.unknown_fields:
        found.append(f"adapter_config.json: {_listed(names)}: ignored, as PEFT ignores what it does not know")
    return tuple(found)


def _about_the_base(config: AdapterConfig, base: BaseModel) -> list[str]:
    found = []
    name, revision = config.base_model_name_or_path or "", config.revision or ""
    if base_names.differs(name, base.ids):
        found.append(f"it was made for the base model {name[:200]!r}, but this is {base.ids[0][:200]!r}")
    elif name and _COMMIT.fullmatch(revision) and _COMMIT.fullmatch(base.revision) and revision != base.revision:
        found.append(f"it was made for revision {revision} of the base model, but this is {base.revision}")
    made_for = config.auto_mapping.base_model_class if config.auto_mapping else None
    others = (
        "Model",
        "ForSequenceClassification",
        "ForTokenClassification",
    )  # the same with another head, or none
    alike = {base.architecture, *(base.architecture.replace("ForCausalLM", other) for other in others)}
    if made_for is not None and made_for not in alike:
        found.append(f"it was made for a {made_for[:100]} (auto_mapping), but this is a {base.architecture}")
    if config.task_type not in ("CAUSAL_LM", "FEATURE_EXTRACTION", *CLASSIFYING, None):
        found.append(f"task_type is {config.task_type!r}, but this model is a causal decoder: ignored")
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name[:100] for name in names[:_SHOWN]) + more
