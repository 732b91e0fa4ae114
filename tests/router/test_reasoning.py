"""Thoughts are separated from answers, however these are divided into pieces."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_router.text.reasoning import TAGS, Reasoning, ReasoningParser, find_tags


def parse(pieces: list[str], begun: bool) -> tuple[str, str]:
    """(thoughts, answer)"""
    parser, found = ReasoningParser(("<think>", "</think>"), begun), list[Reasoning | str]()
    for piece in pieces:
        found += parser.feed(piece)
    found += parser.flush()
    assert all(piece.text if isinstance(piece, Reasoning) else piece for piece in found)
    thoughts = "".join(piece.text for piece in found if isinstance(piece, Reasoning))
    return thoughts, "".join(piece for piece in found if isinstance(piece, str))


@pytest.mark.parametrize(
    ("text", "begun", "found"),
    [
        ("<think>\nI add.\n</think>\n\nFour.\n", False, ("I add.\n", "Four.\n")),
        ("\n<think>I add.</think>Four.", False, ("I add.", "Four.")),
        ("I add.\n</think>\n\nFour.", True, ("I add.\n", "Four.")),
        ("<think>\nI add.</think>Four.", True, ("I add.", "Four.")),  # the tag is there twice
        ("I add < and </thin", True, ("I add < and </thin", "")),  # cut off
        ("\n\n", True, ("", "")),
        ("<think>\n\n</think>\n\nFour.", False, ("", "Four.")),
        ("Four. <think>no</think>", False, ("", "Four. <think>no</think>")),
        (" <thin", False, ("", " <thin")),
        ("a</think>b</think>c", True, ("a", "b</think>c")),
        ("", False, ("", "")),
    ],
)
@given(data=st.data())
def test_thoughts_are_found_wherever_the_text_is_divided(
    text: str, begun: bool, found: tuple[str, str], data: st.DataObject
):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    places = [0, *cuts, len(text)]
    assert parse([text[start:stop] for start, stop in itertools.pairwise(places)], begun) == found


def test_only_what_may_be_a_tag_is_held_back():
    parser = ReasoningParser(("<think>", "</think>"), begun=True)
    assert parser.feed("I add") == [Reasoning("I add")]
    assert parser.feed(" a </th") == [Reasoning(" a ")]
    assert parser.feed("is") == [Reasoning("</this")]
    assert parser.feed("</think>") == [] == parser.feed("\n")
    assert parser.feed("Four") == ["Four"] and parser.feed("</think>") == ["</think>"]


def test_tags_are_seen_in_the_prompt_and_the_template():
    think = TAGS[0]
    assert find_tags(["{{ no tags }}"], "<|assistant|>\n<think>\n") == (think, True)
    assert find_tags(["{% if '</think>' in content %}"], "<|assistant|>") == (think, False)
    assert find_tags(["{% if '</think>' in content %}"], "<think>\n\n</think>\n\n") == (think, False)
    assert find_tags(["{{ '</seed:think>' }}"], "<seed:bos>assistant") == (TAGS[1], False)
    assert find_tags(["{{ messages }}"], "assistant\n") is None
