"""Tokens as bytes. A token may not be text by itself, because a character can be divided over several tokens."""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import tokenizers

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's notation of a byte


class TokenBytes:
    """The bytes of each token in a vocabulary. The bytes of a text's tokens add up to the text, except that a tokenizer
    that removes a space before the first word has one more."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token: added.content for token, added in tokenizer.get_added_tokens_decoder().items()}
        self._kinds = set(_kinds(json.loads(tokenizer.decoder.__getstate__()))) if tokenizer.decoder else set()
        self._found: dict[int, bytes] = {}

    def of(self, token: int) -> bytes:
        """The token's bytes; none for an id that the vocabulary does not have."""
        found = self._found.get(token)
        if found is None:
            found = self._found[token] = self._read(token)
        return found

    def _read(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        written = self._tokenizer.id_to_token(token)
        if written is None:
            return b""
        if "ByteLevel" in self._kinds:
            if all(letter in ALPHABET for letter in written):
                return bytes(ALPHABET[letter] for letter in written)
            return written.encode()
        if "ByteFallback" in self._kinds and (byte := BYTE.fullmatch(written)):
            return bytes.fromhex(byte[1])
        before = self._tokenizer.decode(self._word, skip_special_tokens=False)
        return self._tokenizer.decode([*self._word, token], skip_special_tokens=False)[len(before) :].encode()

    @cached_property
    def _word(self) -> list[int]:
        """A token that is a word, because many decoders write a text's first word differently from later ones."""
        for token in range(self._tokenizer.get_vocab_size()):
            written = self._tokenizer.id_to_token(token)
            if token not in self._added and written and written.isascii() and written.isalnum():
                return [token]
        return []


def _kinds(decoder: dict[str, Any]) -> Iterator[str]:
    yield decoder["type"]
    for part in decoder.get("decoders", ()):
        yield from _kinds(part)


def _alphabet() -> dict[str, int]:
    """The characters of byte-level vocabularies, as introduced by GPT-2: printable bytes are written as themselves, and
    the others as the characters from 256 on, in their order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(others)}


ALPHABET = _alphabet()
