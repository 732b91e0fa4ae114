"""Tool calls are found in answers, however these are divided into pieces."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_router.text.tool_calls import Arguments, Piece, ToolCall, ToolCallParser

CALL = '{"name": "add", "arguments": {"a": 1}}'
ADD = ToolCall("add"), Arguments('{"a": 1}')


def parse(pieces: list[str]) -> list[Piece]:
    """The parser's results, with adjacent content or arguments joined."""
    parser = ToolCallParser({"add"})
    found: list[Piece] = []
    for piece in [*(part for text in pieces for part in parser.feed(text)), *parser.flush()]:
        match found[-1:], piece:
            case [str(before)], str():
                found[-1] = before + piece
            case [Arguments(before)], Arguments(text):
                found[-1] = Arguments(before + text)
            case _:
                found.append(piece)
    return found


@pytest.mark.parametrize("end", range(2 * len(CALL) + 5))
def test_an_answer_that_must_be_calls_has_no_content_wherever_it_is_divided(end: int) -> None:
    parser = ToolCallParser({"add"}, calls_alone=True)
    text = f"[{CALL}, {CALL}]"[:end]
    assert not [piece for piece in [*parser.feed(text), *parser.flush()] if isinstance(piece, str)]


def test_white_space_after_a_call_is_kept_however_it_arrives():
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    assert parse([call, "\n", "and", " ", "more"])[2:] == ["and more"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Just text, with a < and a {.", ["Just text, with a < and a {."]),
        (f"<tool_call>\n{CALL}\n</tool_call>", [*ADD]),
        (f"I add.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n", ["I add.\n", *ADD, *ADD]),
        (CALL, [*ADD]),
        (f" [{CALL}, {CALL}]", [*ADD, *ADD]),
        ('{"name": "add", "parameters": {"a": 1}}', [*ADD]),
        (f"<tool_call>{CALL}", [*ADD]),  # the answer ends after the call
        (CALL[:-4], [ToolCall("add"), Arguments('{"a":')]),  # the answer ends within the call
        (f"<tool_call>{CALL} and no tag", [*ADD, "and no tag"]),
        ('{"type": "function", "name": "add", "parameters": {"a": 1}}', [*ADD]),
        ('{"arguments": {"a": "}"}, "name": "add"}', [ToolCall("add"), Arguments('{"a": "}"}')]),
        ('{"name": "add", "arguments": {"a": "\\"}"}, "id": 1}', [ToolCall("add"), Arguments('{"a": "\\"}"}')]),
        ('{"name": "add"}', [ToolCall("add"), Arguments("{}")]),
        ('{"name": ["add"]}', ['{"name": ["add"]}']),
        ('{"answer": 5} is JSON', ['{"answer": 5} is JSON']),
        ('{"name": "other", "arguments": {}}', ['{"name": "other", "arguments": {}}']),
        ("<tool_call>no JSON</tool_call> or so", ["<tool_call>no JSON</tool_call> or so"]),
        ('[{"name": "add", "argu', ['[{"name": "add", "argu']),
        ("<tool_ca", ["<tool_ca"]),
        ("", []),
    ],
)
@given(data=st.data())
def test_calls_are_found_wherever_the_text_is_divided(text: str, found: list[Piece], data: st.DataObject):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    places = [0, *cuts, len(text)]
    assert parse([text[start:stop] for start, stop in itertools.pairwise(places)]) == found


def test_content_is_only_held_back_while_it_may_begin_a_call():
    parser = ToolCallParser({"add"})
    assert parser.feed("Hello") == ["Hello"]
    assert parser.feed(" <tool") == [" "]
    assert parser.feed("box>") == ["<toolbox>"]
    parser = ToolCallParser({"add"})
    assert parser.feed('{"answer":') == ['{"answer":']


def test_arguments_are_passed_on_as_they_arrive():
    parser = ToolCallParser({"add"})
    assert parser.feed('{"name": "add", "arguments": {"a"') == [ToolCall("add"), Arguments('{"a"')]
    assert parser.feed(": [1, ") == [Arguments(": [1, ")]
    assert parser.feed("2]}}") == [Arguments("2]}")]
    assert parser.flush() == []


def test_many_calls_in_one_piece_are_found():
    assert parse([f"[{', '.join([CALL] * 3000)}]"]) == [*ADD] * 3000
