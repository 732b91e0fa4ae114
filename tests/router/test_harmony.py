"""GPT-OSS's answers are divided into thoughts, content and calls, however they arrive."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_router.api.calls import AnswerReader
from loraplex_router.engine.delta import Delta
from loraplex_router.text.reasoning import HARMONY, Reasoning
from loraplex_router.text.tool_calls import Arguments, ToolCall
from loraplex_router.vocabulary.sequence import FinishReason

THOUGHTS = "<|channel|>analysis<|message|>I look.<|end|>"
START = "<|start|>assistant"
CALL = "<|channel|>commentary to=functions.weather json<|message|>"
CALL_OF_ROLE = f"{START} to=functions.weather<|channel|>commentary json<|message|>"  # the other form of it
ROME = '{"city": "Rome"}'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"{THOUGHTS}{START}<|channel|>final<|message|>Sunny.", ("I look.", "Sunny.", [])),
        ("<|channel|>final<|message|>Sunny.", ("", "Sunny.", [])),
        ("Sunny < cloudy.", ("", "Sunny < cloudy.", [])),
        (f"{THOUGHTS}{START}{CALL}{ROME}", ("I look.", "", [("weather", ROME)])),
        (f"{THOUGHTS}{CALL_OF_ROLE}{ROME}<|call|>", ("I look.", "", [("weather", ROME)])),
        (f"{THOUGHTS}{START}{THOUGHTS}{START}<|channel|>fin", ("I look.I look.", "", [])),
        (f"<|channel|>commentary<|message|>Well.<|end|>{START}{CALL}{ROME}", ("", "Well.", [("weather", ROME)])),
        (f"{CALL.replace('weather', 'other')}{ROME}", ("", ROME, [])),
        ("<|channel|>analysis<|message|>I lo", ("I lo", "", [])),
        ("", ("", "", [])),
    ],
)
@given(data=st.data())
def test_channels_are_separated_wherever_the_text_is_divided(
    text: str, found: tuple[str, str, list[tuple[str, str]]], data: st.DataObject
):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    reader = AnswerReader({"weather"}, thoughts=HARMONY)
    thoughts, content, calls = "", "", list[tuple[str, str]]()
    for start, stop in itertools.pairwise([0, *cuts, len(text), len(text)]):
        last = FinishReason.END_TOKEN if start == stop == len(text) else None
        for piece in reader.pieces(Delta(text[start:stop], finish_reason=last)):
            match piece:
                case Reasoning():
                    thoughts += piece.text
                case ToolCall():
                    calls.append((piece.name, ""))
                case Arguments():
                    calls[-1] = calls[-1][0], calls[-1][1] + piece.text
                case _:
                    content += piece
    assert (thoughts, content, calls) == found and reader.calls == len(calls)
