"""Tokens as bytes: the bytes of a text's tokens add up to the text, for every kind of tokenizer."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_router.text.tokenizer import Tokenizer
from loraplex_shard.checkpoint.opening import open_checkpoint
from tests.router.tiny_tokenizers import (
    byte_tokenizer,
    metaspace_tokenizer,
    sentencepiece_tokenizer,
    wordpiece_tokenizer,
)

SPECIAL = "<|im_start|>"
KINDS = {
    "bytes": byte_tokenizer(SPECIAL),
    "SentencePiece": sentencepiece_tokenizer(SPECIAL),
    "Metaspace": metaspace_tokenizer(SPECIAL),
    "WordPiece": wordpiece_tokenizer(),
    "SmolLM2": Tokenizer(open_checkpoint("").tokenizer().tokenizer_json),
}
TEXTS = st.lists(st.sampled_from(["a", "b", "hello", " ", "é", "😀", "日", "\n", SPECIAL, "!"]), max_size=9).map(
    "".join
)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_the_bytes_of_a_texts_tokens_add_up_to_the_text(kind: str, text: str):
    tokenizer = KINDS[kind]
    tokens = asyncio.run(tokenizer.encode(text))
    found = b"".join(map(tokenizer.token_bytes, tokens)).decode()
    shown = tokenizer.verbatim.decode(tokens)
    assert found in (shown, " " + shown)
    assert "".join(tokenizer.token_texts(tokens, True)) == shown
    assert "".join(tokenizer.token_texts(tokens, False)) == tokenizer.decode(tokens)


def test_a_tokens_bytes_do_not_depend_on_its_position():
    for kind, text, tokens in (
        ("bytes", "é", [b"\xc3", b"\xa9"]),
        ("SentencePiece", "hello é日", [b" hello", b" ", "é".encode(), b"\xe6", b"\x97", b"\xa5"]),
        ("SmolLM2", " world\n", [b" world", b"\n"]),
        ("SmolLM2", SPECIAL, [SPECIAL.encode()]),
    ):
        ids = asyncio.run(
            KINDS[kind].encode(
                text,
            )
        )
        assert [KINDS[kind].token_bytes(token) for token in ids] == tokens
    assert KINDS["bytes"].token_bytes(10_000) == b""
    parts = [KINDS["bytes"].partial_bytes(token) for token in asyncio.run(KINDS["bytes"].encode("é€a"))]
    assert parts == [b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xac", b""]


def test_each_token_adds_a_piece_and_a_characters_last_token_completes_it():
    tokenizer = KINDS["SentencePiece"]
    tokens = [*asyncio.run(tokenizer.encode("<s>hello é日!")), asyncio.run(tokenizer.encode("日"))[-1]]
    shown = ["<s>", " hello", " ", "é", "", "", "日", "!", "\ufffd"]
    assert tokenizer.token_texts(tokens, show_special_tokens=True) == shown
    assert tokenizer.token_texts(tokens, show_special_tokens=False) == ["", "hello", *shown[2:]]
    broken = [tokens[-3], tokens[1], tokens[-1]]
    assert tokenizer.token_texts(broken, show_special_tokens=False) == ["\ufffd", " hello", "\ufffd"]
    assert tokenizer.token_texts([], show_special_tokens=False) == []
