"""Detokenizing, stop strings and chat templates, on a byte-level tokenizer made here."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from loraplex_protos.errors import InvalidRequestError
from loraplex_router.text.chat import Chat, ChatTemplate, Message
from loraplex_router.text.detokenizer import Detokenizer
from loraplex_router.text.stops import StopMatcher
from loraplex_router.text.tokenizer import LONG_TEXT, Tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('unknown role') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token per byte, so that every character beyond ASCII is spread over several."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return Tokenizer(tokenizer.to_str().encode(), ChatTemplate(TEMPLATE, "", "</s>"))


TOKENIZER = byte_tokenizer()


async def ids(text: str) -> list[int]:
    return await TOKENIZER.encode(text)


@given(prompt=st.text(max_size=10), text=st.text(max_size=30))
async def test_pieces_are_whole_characters_and_add_up_to_the_text(prompt, text):
    detokenizer = Detokenizer(TOKENIZER, await ids(prompt))
    pieces = [detokenizer.push(token) for token in await ids(text)]
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + detokenizer.flush() == text


async def test_a_character_cut_off_at_the_end_is_shown_as_replacement():
    detokenizer = Detokenizer(TOKENIZER, [])
    pieces = [detokenizer.push(token) for token in (await ids("a€"))[:-1]]
    assert "".join(pieces) == "a"
    assert detokenizer.flush() == "\ufffd"


async def test_bytes_that_never_become_a_character_do_not_hold_up_the_stream():
    detokenizer = Detokenizer(TOKENIZER, [])
    lone_continuation = (await ids("€"))[-1]
    assert "\ufffd" in "".join(detokenizer.push(lone_continuation) for _ in range(8))


async def test_a_metaspace_tokenizer_keeps_the_space_before_the_first_output_token():
    model = tokenizers.models.WordLevel({"▁hello": 0, "▁world": 1}, unk_token="▁hello")
    plain = tokenizers.Tokenizer(model)
    plain.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(plain.to_str().encode(), None)
    assert Detokenizer(tokenizer, [0]).push(1) == " world"


@given(
    text=st.text("ab€", max_size=40),
    stops=st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 5), max_size=40),
)
def test_text_up_to_the_first_stop_string_is_shown_and_nothing_of_what_follows(text, stops, cuts):
    matcher, shown, stopped, rest = StopMatcher(stops), "", False, text
    for cut in [*cuts, len(text) + 1]:
        piece, rest = rest[:cut], rest[cut:]
        new, stopped = matcher.feed(piece)
        shown += new
        assert not any(stop in shown for stop in stops)
        if stopped:
            break
    if not stopped:
        shown += matcher.flush()
        assert shown == text and not any(stop in text for stop in stops)
    else:
        assert text.startswith(shown) and any(text[len(shown) :].startswith(stop) for stop in stops)


def test_text_is_held_back_only_while_it_can_become_a_stop_string():
    matcher = StopMatcher(["</end>"])
    assert matcher.feed("a</e") == ("a", False)
    assert matcher.feed("x") == ("</ex", False)
    assert matcher.feed("</") == ("", False)
    assert matcher.feed("end> secret") == ("", True)


def test_a_chat_template_renders_up_to_where_the_answer_begins():
    messages = Message("user", 'Hi "there" <b>'), Message("assistant", "Hello"), Message("user", "Bye")
    prompt = ChatTemplate(TEMPLATE, "", "</s>").render(Chat(messages))
    assert prompt == '<user>Hi "there" <b></s><assistant>Hello</s><user>Bye</s><assistant>'


async def test_special_tokens_of_a_rendered_chat_become_single_tokens():
    tokens = await TOKENIZER.encode(Chat((Message("user", "x"),)))
    assert [TOKENIZER.token_text(token) for token in tokens].count("</s>") == 1


async def test_every_token_knows_its_place_in_the_text():
    spans = await TOKENIZER.spans("aé")
    assert [(span.text, span.start, span.stop) for span in spans] == [("a", 0, 1), ("é", 1, 2), ("é", 1, 2)]


async def test_messages_that_the_template_refuses_are_an_error_that_says_why():
    with pytest.raises(InvalidRequestError, match=r"chat\.messages.*unknown role"):
        await TOKENIZER.encode(Chat((Message("narrator", "x"),)))


def test_a_template_cannot_reach_outside_its_sandbox():
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", "", "")
    with pytest.raises(InvalidRequestError):
        template.render(Chat((Message("user", "x"),)))


def test_tojson_leaves_text_as_it_is():
    template = ChatTemplate("{{ messages[0].content | tojson }}", "", "")
    assert json.loads(template.render(Chat((Message("user", "<é>"),)))) == "<é>"


async def test_long_texts_give_the_same_tokens_as_short_ones():
    text = "wörd " * LONG_TEXT
    assert await ids(text) == (await ids("wörd ")) * LONG_TEXT


@pytest.mark.parametrize("pieces", [["one STOP two"], ["one S", "TO", "P two"], list("one STOP two")])
def test_a_stop_string_is_the_end_of_the_text_where_it_is_to_be_included(pieces: list[str]):
    matcher, shown, stopped = StopMatcher(["STOP", "two"], include=True), "", False
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        shown += text
        if stopped:
            break
    assert (shown, stopped) == ("one STOP", True)
