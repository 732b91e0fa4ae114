"""An adapter's own tokens: a tokenizer with more tokens than the model's, or with other texts for some of them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache

from tokenizers import Tokenizer

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.sources.text_files import TOKENIZER, AdapterText, AddedToken

Added = tuple[tuple[int, AddedToken], ...]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that an adapter has."""

    size: int  # it has embeddings for ids below
    tokenizer_json: bytes = b""  # empty: the model's
    own: Added = ()  # not in the model's tokenizer

    def token_id(self, text: str, base: BaseModel) -> int | None:
        """The id of the token with exactly this text, if the adapter has it."""
        id = next((id for id, token in self.own if token.content == text), base.token_id(text))
        return id if id is not None and id < self.size else None


def read_vocabulary(text: AdapterText, base: BaseModel, size: int) -> Vocabulary:
    """The vocabulary of an adapter with embeddings for so many tokens.

    Raises AdapterInvalidError if its tokenizer is another base's, so that its own tokens would mean something else.
    """
    own = _own_tokens(text.added_tokens, base, size)
    if not own or base.tokenizer is None:
        return Vocabulary(size)
    return Vocabulary(size, _with_tokens(base.tokenizer, own), own)


def _own_tokens(added: Mapping[int, AddedToken], base: BaseModel, size: int) -> Added:
    """Those that the model's tokenizer does not have, and that the adapter has embeddings for."""
    if base.tokenizer is None:
        return ()
    special = base.tokenizer.get_added_tokens_decoder()
    own = []
    for id, token in sorted(added.items()):
        if id >= size or base.token_id(token.content) is not None:
            continue
        there = base.tokenizer.id_to_token(id)
        if there is None or id in special:
            own.append((id, token))
        elif size != base.vocab_size:
            raise AdapterInvalidError(
                f"{TOKENIZER}: token {id} is {token.content[:100]!r}, but {there[:100]!r} in the model's vocabulary:"
                " the adapter was made for another base"
            )
    return tuple(own)


@lru_cache(maxsize=8)
def _with_tokens(tokenizer: Tokenizer, own: Added) -> bytes:
    """A tokenizer.json with these tokens as well, in place of added ones with the same ids.

    The `tokenizers` library numbers added tokens one after the other, unless the model's vocabulary has them.
    """
    content = json.loads(tokenizer.to_str())
    added = {token["id"]: token for token in content["added_tokens"]}
    vocabulary = content["model"].get("vocab")
    for id, token in own:
        if id in added and isinstance(vocabulary, dict):
            vocabulary.pop(added[id]["content"], None)
        added[id] = {"id": id, **asdict(token)}
    if isinstance(vocabulary, dict):
        vocabulary.update((token["content"], id) for id, token in added.items())
    content["added_tokens"] = [added[id] for id in sorted(added)]
    written = json.dumps(content, ensure_ascii=False).encode()
    read = Tokenizer.from_buffer(written)
    for id, token in own:
        if (found := read.token_to_id(token.content)) != id:
            raise AdapterInvalidError(
                f"{TOKENIZER}: {token.content[:100]!r} is token {id}, which cannot be added to the model's tokenizer:"
                f" there it would be {found}"
            )
    return written
