"""Finds the tokens of a Hugging Face checkpoint that end an answer. Its files name them in three places, and none of
these need have all of them."""

from typing import Any

from transformers import PreTrainedConfig

from loraplex_shard.checkpoint.base import CheckpointError

_ANSWER = "forty-two"  # a text that no template contains


def end_token_ids(tokenizer: Any, generation: dict[str, Any], config: PreTrainedConfig) -> tuple[int, ...]:
    """The tokenizer's own end token, then the others in ascending order.

    `generation` is the content of generation_config.json. If it names no end tokens, those of config.json are used, as
    in transformers. In addition, the special token that the chat template writes after an answer is an end token: a
    fine-tuned model has learnt it, even if its configuration is still that of its base.

    Raises CheckpointError for a value that is not a token's id.
    """
    named = generation.get("eos_token_id")
    for part in (config, config.get_text_config(decoder=True)):
        named = getattr(part, "eos_token_id", None) if named is None else named
    named = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(id) is int for id in named):
        raise CheckpointError("eos_token_id is neither a token's id nor a list of them")
    own = tokenizer.eos_token_id
    ids = {*named, own, _turn_end(tokenizer)} - {None}
    return tuple(sorted(ids, key=lambda id: (id != own, id)))


def _turn_end(tokenizer: Any) -> int | None:
    """The special token that the template writes after an answer; None if there is no template or no such token."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "6 * 7?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template may raise anything; a chat reports it
        return None
    _, found, rest = text.rpartition(_ANSWER)
    tokens = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    following = [token for token in tokens if found and rest.lstrip().startswith(token)]
    return tokens[max(following, key=len)] if following else None
