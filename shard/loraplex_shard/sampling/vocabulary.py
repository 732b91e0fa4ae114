"""Where the tokenizer and the embedding differ in size. Somebody adds a token to the tokenizer alone; or the embedding
has rows to spare, which no token needs."""

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

SHOWN = 5

logger = logging.getLogger(__name__)


def keep_known(end_token_ids: Iterable[int], rows: int) -> tuple[int, ...]:
    """The end tokens that a model with `rows` embeddings can sample; what it cannot sample is said in the log."""
    ids = tuple(end_token_ids)
    if unknown := [token for token in ids if not 0 <= token < rows]:
        logger.warning("ignoring end tokens %s: the model only has embeddings for tokens 0 to %d", unknown, rows - 1)
    return tuple(token for token in ids if 0 <= token < rows)


def compare(tokens: Mapping[str, int], rows: int) -> None:
    """Says in the log which of the tokenizer's tokens a model with `rows` embeddings has no embedding for."""
    if beyond := sorted((id, token) for token, id in tokens.items() if id >= rows):
        shown = ", ".join(f"{token!r} ({id})" for id, token in beyond[:SHOWN])
        logger.warning(
            "the tokenizer has %d tokens without a row in the embedding (%d rows): %s%s. Requests that contain one "
            "are refused. Is it this model's tokenizer? If so, transformers' resize_token_embeddings makes room",
            *(len(beyond), rows, shown, ", ..." if len(beyond) > SHOWN else ""),
        )


def truncate_tokenizer(tokenizer_json: bytes, rows: int) -> tuple[str, int]:
    """The tokenizer.json without the tokens from `rows` on, so that what matches a grammar is spelled without them; and
    the least number that is above all others' ids."""
    text = tokenizer_json.decode()
    tokenizer = json.loads(text)
    added, model = tokenizer.get("added_tokens") or [], tokenizer.get("model") or {}
    vocabulary = model.get("vocab") or {}
    ids = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
    size = max(max(ids, default=-1), max((token["id"] for token in added), default=-1)) + 1
    if size <= rows:
        return text, size
    tokenizer["added_tokens"] = [token for token in added if token["id"] < rows]
    if isinstance(vocabulary, list):  # Unigram's: a token's id is its place
        model["vocab"] = vocabulary[:rows]
    else:
        model["vocab"] = {token: number for token, number in vocabulary.items() if number < rows}
        if model.get("merges"):
            model["merges"] = [merge for merge in model["merges"] if _merged(model, merge) in model["vocab"]]
    return json.dumps(tokenizer), rows


def _merged(model: dict[str, Any], merge: str | list[str]) -> str:
    """What BPE makes of the two tokens."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")
