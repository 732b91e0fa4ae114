"""Reads an adapter's files into the weights that this rank's layers use. Knows nothing about sources, slots or devices.

Every rank checks the whole adapter before it cuts its part, so all ranks refuse the same adapters.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from loraplex_protos.errors import AdapterInvalidError, FieldViolation, InvalidRequestError
from loraplex_shard.lora.peft import own_tokens
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.classifiers import is_of_classifier
from loraplex_shard.lora.peft.config import AdapterConfig
from loraplex_shard.lora.peft.doubts import find_doubts
from loraplex_shard.lora.peft.forms import modules_in_any_form
from loraplex_shard.lora.peft.invocation import read_invocation
from loraplex_shard.lora.peft.parsing import config_of
from loraplex_shard.lora.peft.shapes import listed
from loraplex_shard.lora.peft.special_tokens import end_tokens, foreign_tokens
from loraplex_shard.lora.peft.tensor_names import PREFIX, as_saved_by_peft, is_of_another_part
from loraplex_shard.lora.peft.tensors import read_tensors
from loraplex_shard.lora.peft.whole import WholeAdapter, is_unused, understand
from loraplex_shard.lora.sources.files import TENSORS, AdapterFiles
from loraplex_shard.lora.sources.model_config import ModelConfig
from loraplex_shard.lora.weights.deltas import Delta, HostAdapter, partition_adapter
from loraplex_shard.lora.weights.own import own_weights
from loraplex_shard.shapes.layout import LinearLayout

_MERGED = frozenset({"LORA", "IA3", "MLX-LM", "GGUF"})


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
    config = config_of(files)
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
    names = as_saved_by_peft(read_tensors(files.tensors)) if base.uncalled else ()
    if unused := {name for name in names if is_unused(name, base)}:
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
    config = config_of(files)
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


def cut_adapter(
    whole: WholeAdapter, layouts: Sequence[LinearLayout], base: BaseModel, dtype: torch.dtype
) -> HostAdapter:
    """Cuts an adapter to the layouts, with what it has outside them. Raises AdapterInvalidError as partition_adapter
    does."""
    if base.served is None:
        return partition_adapter(whole.deltas, layouts, dtype, whole.classifier)
    for name, norm in whole.norms.items():
        if not norm.float().isfinite().all():
            raise AdapterInvalidError(f"{TENSORS}: {PREFIX}{name} has values that are NaN or infinite")
    norms = base.served.read_norms(whole.norms) if whole.norms else ()
    own = own_weights(whole.deltas, norms, layouts, base.served.vocabulary, base.served.pack)
    return partition_adapter(whole.deltas, layouts, dtype, whole.classifier, own)


def _read(
    config: AdapterConfig,
    files: AdapterFiles,
    layouts: Sequence[LinearLayout],
    base: BaseModel,
    limit: int = sys.maxsize,
) -> WholeAdapter:
    return understand(config, read_tensors(files.tensors), files.model_config, layouts, base, limit)


def check_shapes(
    config: AdapterConfig, shapes: dict[str, torch.Tensor], layouts: Sequence[LinearLayout], base: BaseModel
) -> None:
    """Raises AdapterInvalidError for what can be seen to be wrong with an adapter without the values of its tensors,
    which are on the meta device: those that are missing, too many, or of a wrong shape. Only of plain LoRA and DoRA."""
    plain = config.peft_type in ("LORA", "GGUF") and not (config.use_bdlora or config.use_qalora)
    if plain and not any(map(is_of_classifier, as_saved_by_peft(shapes, base.backbone))):
        understand(config, shapes, ModelConfig(), layouts, base, sys.maxsize)
