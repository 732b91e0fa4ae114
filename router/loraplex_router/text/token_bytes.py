"""What tokens are: bytes. One alone need not be text, for a character can be spread over several."""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import tokenizers

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece writes one


class TokenBytes:
    """The bytes of each token of a vocabulary: those of all tokens of a text are the text's. Only a tokenizer that
    leaves out a space before the text's first word has one more."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token: added.content for token, added in tokenizer.get_added_tokens_decoder().items()}
        self._kinds = set(_kinds(json.loads(tokenizer.decoder.__getstate__()))) if tokenizer.decoder else set()
        self._found: dict[int, bytes] = {}

    def of(self, token: int) -> bytes:
        """Of an id that the vocabulary does not have: none."""
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
        """A token that is a word: many decoders write the next one otherwise than the first of a text."""
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
    """The letters in which byte-level vocabularies are written, as GPT-2 introduced them: bytes that can be printed
    stand for themselves, the others for the letters from 256 on, in their order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(others)}


ALPHABET = _alphabet()
