"""Which tokens of a Hugging Face checkpoint end an answer. Its files name them in three places, and not all in each."""

from typing import Any

from transformers import PreTrainedConfig

from loraplex_shard.checkpoint.base import CheckpointError

_ANSWER = "forty-two"  # no template writes it by itself


def end_token_ids(tokenizer: Any, generation: dict[str, Any], config: PreTrainedConfig) -> tuple[int, ...]:
    """The tokenizer's own end token, then the others in ascending order.

    `generation` is generation_config.json's content; as with transformers, config.json counts if that names none.
    Beside these, it ends with the special token that the chat template writes behind an answer: a fine-tuned model has
    learnt that one, though it may still be configured as its base was. Raises CheckpointError for what is no id.
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
    """The special token that follows an answer in a conversation; None if there is no template, or none follows."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "6 * 7?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template may raise anything; chats will say so
        return None
    _, found, rest = text.rpartition(_ANSWER)
    tokens = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    following = [token for token in tokens if found and rest.lstrip().startswith(token)]
    return tokens[max(following, key=len)] if following else None
