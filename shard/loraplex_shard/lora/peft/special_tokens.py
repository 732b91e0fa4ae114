"""Finds an adapter's special tokens in the base's vocabulary."""

from collections.abc import Collection, Iterable

from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.own_tokens import Vocabulary
from loraplex_shard.lora.sources.text_files import GENERATION_CONFIG, AdapterText

SHOWN = 5  # tokens in a warning


def end_tokens(text: AdapterText, base: BaseModel, vocabulary: Vocabulary) -> tuple[tuple[int, ...], list[str]]:
    """Returns the end tokens of the adapter's answers in its vocabulary, and warnings about the others."""
    found, wrong = set[int](), list[str]()
    for token in text.end_token_ids:
        if token < vocabulary.size:
            found.add(token)
        else:
            wrong.append(f"{GENERATION_CONFIG}: eos_token_id {token} is beyond the model's vocabulary: it ends nothing")
    if name := text.special_tokens.get("eos_token"):
        token_id = vocabulary.token_id(name, base)
        if token_id is None:
            wrong.append(f"the model's vocabulary has no {name[:100]!r}, which is its eos_token: it ends nothing")
        else:
            found.add(token_id)
    return tuple(sorted(found)), wrong


def foreign_tokens(text: AdapterText, base: BaseModel, own: Collection[int] = ()) -> list[str]:
    """Warnings about a tokenizer that differs from the model's: prompts become other tokens than in training. `own` are
    ids of tokens that the adapter has all the same."""
    if base.tokenizer is None:
        return []
    padding = text.special_tokens.get("pad_token")  # many trainers add one, but prompts do not contain it
    added = {id: token.content for id, token in sorted(text.added_tokens.items()) if id not in own}
    added = {id: token for id, token in added.items() if token != padding}
    missing = [token for token in added.values() if base.token_id(token) is None]
    renamed = [id for id, token in added.items() if token not in missing and base.token_id(token) != id]
    found = []
    if missing:
        found.append(f"its tokenizer has tokens that this model does not have: {_quoted(missing)}")
    if renamed:
        found.append(
            f"its tokenizer numbers tokens in another way than the model's: {_quoted(map(added.get, renamed))}"
        )
    return found


def _quoted(tokens: Iterable[object]) -> str:
    shown = list(tokens)
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(repr(str(token)[:100]) for token in shown[:SHOWN]) + more
