"""Rerankers that are language models: they answer a question about a pair with one of a few tokens, such as "yes" or
"no". The classifier is made of these tokens' rows of the lm head, as vLLM does it by the same fields of config.json."""

from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.shapes.classifier import Activation, Classes, Classifier, activation_of

TOKENS, METHOD, QWEN3 = "classifier_from_token", "method", "is_original_qwen3_reranker"
TWO_WAY, AS_THEY_ARE = "from_2_way_softmax", "no_post_processing"


class Tensors(Protocol):
    def read(self, name: str, rows: slice) -> torch.Tensor: ...


def is_of_answers(config: PreTrainedConfig) -> bool:
    return getattr(config, TOKENS, None) is not None


def read_answers(tensors: Tensors, names: frozenset[str], config: PreTrainedConfig, tokenizer: Any) -> Classifier:
    """Raises CheckpointError if the fields do not name tokens of the model, or the method is unknown."""
    answers = getattr(config, TOKENS)
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise CheckpointError(f"config.json: {TOKENS} is not a list of tokens")
    method = TWO_WAY if getattr(config, QWEN3, False) else getattr(config, METHOD, None)
    if method not in (TWO_WAY, AS_THEY_ARE):
        raise CheckpointError(f"config.json: {METHOD} {method!r} is not served, only {TWO_WAY} and {AS_THEY_ARE}")
    if method == TWO_WAY and len(answers) != 2:
        raise CheckpointError(f"config.json: {TOKENS}: {TWO_WAY} takes two tokens, not {len(answers)}")
    head = _head(names)
    weight = torch.cat([tensors.read(head, _row(answer, tokenizer)) for answer in answers]).float()
    activation = activation_of(len(answers), config.problem_type)
    if method == TWO_WAY:  # the sigmoid of the difference is the softmax of both
        weight, activation = weight[1:] - weight[:1], Activation.SIGMOID
    labels = tuple(answers[-len(weight) :])
    pad, joins = config.get_text_config(decoder=True).pad_token_id, not getattr(config, "use_sep_token", False)
    return Classifier(weight, None, Classes(False, labels, activation, joins_pairs=joins, pad_token_id=pad))


def _head(names: frozenset[str]) -> str:
    """The tensor of the lm head or, if it is tied, that of the embedding."""
    found = [name for ending in ("lm_head.weight", "embed_tokens.weight") for name in names if name.endswith(ending)]
    if not found:
        raise CheckpointError(f"{TOKENS}: the checkpoint has neither lm_head.weight nor embed_tokens.weight")
    return found[0]


def _row(token: str, tokenizer: Any) -> slice:
    index = tokenizer.get_vocab().get(token)
    if index is None:
        raise CheckpointError(f"config.json: {TOKENS}: the tokenizer has no token {token!r}")
    return slice(index, index + 1)
