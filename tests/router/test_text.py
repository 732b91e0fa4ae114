"""Detokenizing and stop strings, with a byte-level tokenizer that is made here."""

import asyncio
from collections.abc import Iterable, Iterator
from itertools import accumulate

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from loraplex_protos.errors import InvalidRequestError
from loraplex_router.text.detokenizer import Detokenizer
from loraplex_router.text.fill_in_middle import encode_around
from loraplex_router.text.pieces import Piece, read_pieces
from loraplex_router.text.stops import StopMatcher
from loraplex_router.text.tokenizer import LONG_TEXT, MANY_TOKENS, Tokenizer
from loraplex_router.vocabulary.chat import RenderedChat
from tests.router.tiny_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()


async def ids(text: str) -> list[int]:
    return await TOKENIZER.encode(text)


@given(prompt=st.text(max_size=10), text=st.text(max_size=30))
async def test_pieces_are_whole_characters_and_add_up_to_the_text(prompt, text):
    detokenizer = Detokenizer(TOKENIZER, await ids(prompt))
    pieces = [detokenizer.push(token) for token in await ids(text)]
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + detokenizer.flush() == text


async def test_a_prompt_for_the_middle_has_the_models_own_tokens_for_it():
    with_tokens = byte_tokenizer("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    prompt = await encode_around("a", "b<fim_middle>", with_tokens, most=None)
    assert with_tokens.verbatim.decode(prompt) == "<fim_prefix>a<fim_suffix>b<fim_middle><fim_middle>"
    with pytest.raises(InvalidRequestError, match="suffix"):
        await encode_around("a", "b", TOKENIZER, most=None)


async def test_an_incomplete_character_at_the_end_is_shown_as_replacement():
    detokenizer = Detokenizer(TOKENIZER, [])
    pieces = [detokenizer.push(token) for token in (await ids("a€"))[:-1]]
    assert "".join(pieces) == "a"
    assert detokenizer.flush() == "\ufffd"


async def test_bytes_that_never_become_a_character_do_not_delay_the_stream():
    detokenizer = Detokenizer(TOKENIZER, [])
    lone_continuation = (await ids("€"))[-1]
    assert "\ufffd" in "".join(detokenizer.push(lone_continuation) for _ in range(8))


async def test_a_metaspace_tokenizer_keeps_the_space_before_the_first_output_token():
    model = tokenizers.models.WordLevel({"▁hello": 0, "▁world": 1}, unk_token="▁hello")
    plain = tokenizers.Tokenizer(model)
    plain.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(plain.to_str().encode())
    assert Detokenizer(tokenizer, [0]).push(1) == " world"


PIECES = st.lists(st.tuples(st.text("ab€", max_size=3), st.booleans(), st.integers(1, 2)), max_size=12)
STOPS = st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3)


def feed(matcher: StopMatcher, pieces: Iterable[tuple[str, bool]], too_early: int = 0) -> tuple[str, int, str | None]:
    """Passes pieces, each visible or hidden. Returns the visible text, the length that passed, and the stop string."""
    shown, length = "", 0
    for place, (piece, is_shown) in enumerate(pieces):
        passed = matcher.feed(piece, shown=is_shown, too_early=place < too_early)
        shown, length = shown + passed.text, length + passed.length
        if passed.stopped:
            return shown, length, matcher.found
    passed = matcher.flush()
    return shown + passed.text, length + passed.length, matcher.found


@given(pieces=PIECES, stops=STOPS, include=st.booleans())
def test_text_up_to_the_first_stop_string_is_shown_however_it_is_divided_or_hidden(pieces, stops, include):
    letters = [(letter, shown) for piece, shown, _ in pieces for letter in piece]
    seams = (
        {at for at, (_, shown) in enumerate(letters) if shown}
        | set(accumulate(len(piece) for piece, *_ in pieces))
        | {0}
    )
    views = [*range(len(letters))], [at for at, (_, shown) in enumerate(letters) if shown]
    runs = [view[at : at + len(stop)] for view in views for stop in stops for at in range(len(view) - len(stop) + 1)]
    texts = [("".join(letters[at][0] for at in run), run[0], run[-1] + 1) for run in runs]
    found = [(end, start, text) for text, start, end in texts if text in stops and {start, end} <= seams]
    end, start, stop = min(found, default=(len(letters), len(letters), None))
    passed = letters[: end if include else start]
    expected = "".join(letter for letter, shown in passed if shown), len(passed), stop
    whole = [(piece, shown) for piece, shown, _ in pieces]
    cut = [(piece[at : at + size], True) for piece, shown, size in pieces for at in range(0, len(piece), size) if shown]
    assert feed(StopMatcher(stops, include), whole) == expected
    if all(shown for _, shown, _ in pieces):
        assert feed(StopMatcher(stops, include), cut) == expected


@given(pieces=PIECES, stops=STOPS.filter(bool), early=st.integers(0, 12))
def test_a_stop_string_may_begin_before_the_minimum_but_not_end_before_it(pieces, stops, early):
    text, before = "".join(piece for piece, *_ in pieces), sum(len(piece) for piece, *_ in pieces[:early])
    places = [
        (at + len(s), at) for s in stops for at in range(len(text)) if text.startswith(s, at) and at + len(s) > before
    ]
    shown, _, found = feed(StopMatcher(stops), ((piece, True) for piece, *_ in pieces), too_early=early)
    assert shown == text[: min(places)[1] if places else None] and (found is not None) == bool(places)


def test_text_is_held_back_only_while_it_can_become_a_stop_string():
    matcher = StopMatcher(["</end>"])
    assert matcher.feed("a</e") == ("a", 1, False)
    assert matcher.feed("x") == ("</ex", 4, False)
    assert matcher.feed("</") == ("", 0, False)
    assert matcher.feed("end> secret") == ("", 0, True)


async def test_special_tokens_of_a_rendered_chat_become_single_tokens():
    tokens = await TOKENIZER.encode(RenderedChat("<user>x</s>"))
    assert [TOKENIZER.token_text(token) for token in tokens].count("</s>") == 1


def test_a_special_token_at_the_beginning_of_a_text_is_found():
    end = TOKENIZER.special_token_at("\n</s>\n<user>")
    assert end is not None and TOKENIZER.token_text(end) == "</s>"
    assert TOKENIZER.special_token_at("x</s>") is TOKENIZER.special_token_at("") is None


async def test_every_token_has_its_position_in_the_text():
    spans = await TOKENIZER.spans("aé")
    assert [(span.text, span.start, span.stop) for span in spans] == [("a", 0, 1), ("é", 1, 2), ("é", 1, 2)]


async def test_long_texts_give_the_same_tokens_as_short_ones():
    text = "wörd " * LONG_TEXT
    assert await ids(text) == (await ids("wörd ")) * LONG_TEXT


async def test_however_many_long_texts_a_tenant_sends_those_of_others_are_tokenized_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
):
    done = list[str]()  # the first letters of texts of which a piece was tokenized

    def recorded(tokenizer: tokenizers.Tokenizer, text: str) -> Iterator[Piece]:
        for piece in read_pieces(tokenizer, text):
            done.append(text[0])
            yield piece

    monkeypatch.setattr("loraplex_router.text.tokenizer.read_pieces", recorded)
    flood = [asyncio.create_task(TOKENIZER.encode("f" * 100_000, tenant="flood")) for _ in range(100)]
    while len(done) < 10:
        await asyncio.sleep(0.001)
    before = len(done)
    await TOKENIZER.encode("o" * 100_000, tenant="other")
    pieces = done.count("o")
    assert pieces > 10 and len(done) - before < 6 * pieces
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)


async def test_however_many_token_ids_and_bad_words_a_tenant_sends_those_of_others_come_soon() -> None:
    many, done = await ids("a" * 2 * MANY_TOKENS), list[str]()

    async def work(tenant: str) -> None:
        await TOKENIZER.decode_verbatim(many, tenant=tenant)
        await TOKENIZER.spellings(["a"], tenant=tenant)
        done.append(tenant)

    flood = [asyncio.create_task(work("flood")) for _ in range(100)]
    await asyncio.sleep(0)
    await work("other")
    assert len(done) < 20
    await asyncio.gather(*flood)
