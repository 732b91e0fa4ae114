"""A sequence's output while its tokens arrive: text, tokens, and the reason why it ends."""

import asyncio
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_router.engine.delta import Delta
from loraplex_router.engine.output import SequenceOutput
from loraplex_router.text.stops import StopMatcher
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.sequence import FinishReason, Sample, Sequence
from tests.router.tiny_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer("<|start|>", "<|end|>")
END, START, OTHER = 256, 257, 258
LETTERS = asyncio.run(TOKENIZER.encode("ab€"))  # five of them


async def ids(text: str) -> list[int]:
    return await TOKENIZER.encode(text)


def generate(
    tokens: Iterable[int],
    stops: Iterable[str] = (),
    *,
    include: bool = False,
    least: int = 0,
    most: int = 1000,
    shown: bool = False,
    stop_token_ids: tuple[int, ...] = (),
    reads: Iterable[bool] = (),
) -> tuple[Delta, SequenceOutput]:
    """The answer of a sequence that samples these tokens. It is the concatenation of the deltas, which are read after
    each token for which `reads` is true."""
    sequence = Sequence(
        number=1,
        prompt_length=1,
        tokens=[0],
        adapter=Adapter(""),
        max_new_tokens=most,
        min_new_tokens=least,
        end_token_ids=frozenset({END, *stop_token_ids}),
    )
    decoder = TOKENIZER.verbatim if shown else TOKENIZER
    output = SequenceOutput(sequence, decoder, StopMatcher(tuple(stops), include), asyncio.Event(), stop_token_ids)
    whole, turns = Delta(), iter(reads)
    for token in tokens:
        reason = output.push(Sample(token))
        if next(turns, False) and (delta := output.take()):
            whole.add(delta)
        if reason:
            break
    if delta := output.take():
        whole.add(delta)
    return whole, output


@pytest.mark.parametrize(
    ("stops", "options", "text", "tokens"),
    [
        (["<|start|>"], {}, "OK", 3),
        (["<|start|>"], {"include": True}, "OK", 3),
        (["<|start|>"], {"shown": True}, "OK", 3),
        (["<|start|>"], {"shown": True, "include": True}, "OK<|start|>", 3),
        (["s"], {}, "OKu", 5),  # and it is not within a special token
        (["K<|sta"], {}, "OKuser€x", 12),
        (["K<|start|>"], {}, "O", 3),
        (["<|start|>us"], {"include": True}, "OKus", 5),
        (["Kus"], {}, "O", 5),  # of the visible text
        (["er", "s"], {}, "OKu", 5),
        (["K", "OK"], {}, "", 2),
        (["user", "<|start|>"], {}, "OK", 3),
        (["€"], {}, "OKuser", 10),
        (["r€x"], {"include": True}, "OKuser€x", 11),
        (["OK"], {"least": 2}, "OKuser€x", 12),
        (["OK", "s"], {"least": 4}, "OKu", 5),
        (["Kus"], {"least": 4}, "O", 5),
        ([], {"least": 4, "stop_token_ids": (OTHER,)}, "OKuser€x", 12),
    ],
)
async def test_stop_strings_are_matched_in_the_generated_text(
    stops: list[str], options: dict[str, object], text: str, tokens: int
):
    sampled = [*await ids("OK"), START, *await ids("user€x"), OTHER]
    for reads in ([], [True] * 20):
        whole, output = generate(sampled, stops, most=12, reads=reads, **options)
        assert (whole.text, output.generated) == (text, tokens)
        assert output.finish_reason is (FinishReason.STOP_TEXT if tokens < 12 else output.finish_reason)


async def test_a_stop_token_is_part_of_the_answer_if_stop_strings_are():
    sampled = [*await ids("OKu"), START]
    (u,) = await ids("u")
    for token, options, text in (
        (u, {}, "OK"),
        (u, {"include": True}, "OKu"),
        (START, {"include": True}, "OKu"),
        (START, {"include": True, "shown": True}, "OKu<|start|>"),
    ):
        whole, output = generate(sampled, ["x"], stop_token_ids=(token,), **options)
        assert (whole.text, output.stop_reason) == (text, token)
        assert whole.ends[-1] == len(text)
        kept = whole.finish_reason is FinishReason.STOP_TEXT  # otherwise the last token is not reported
        assert kept is bool(options) and len(whole.samples) == output.generated


async def test_an_answer_says_which_stop_ended_it():
    sampled = [*await ids("OK"), START, END]
    for options, reason in (
        ({"stops": ["K", "<|start|>"]}, "K"),
        ({"stops": ["<|start|>"]}, "<|start|>"),
        ({"stop_token_ids": (START,)}, START),
        ({"stop_token_ids": (OTHER,)}, None),
        ({"stop_token_ids": (END,)}, END),
        ({"stops": ["O"], "least": 1}, None),
        ({"most": 2}, None),
    ):
        assert generate(sampled, **options)[1].stop_reason == reason


@given(
    tokens=st.lists(st.sampled_from([*LETTERS, START, OTHER]), max_size=20),
    stops=st.lists(
        st.sampled_from(["a", "ab", "ba", "€", "b€", "<|start|>", "a<|st", "|>b", "a<|start|><|end|>b", "�"]),
        max_size=3,
    ),
    include=st.booleans(),
    least=st.integers(0, 8),
    shown=st.booleans(),
    reads=st.lists(st.booleans(), max_size=20),
)
def test_an_answer_is_the_same_streamed_or_not(tokens, stops, include, least, shown, reads):
    sampled = [*tokens, END]
    options = {"include": include, "least": least, "shown": shown}
    whole, output = generate(sampled, stops, **options)
    streamed, again = generate(sampled, stops, **options, reads=reads)
    assert streamed == whole and (again.generated, again.stop_reason) == (output.generated, output.stop_reason)
    assert whole.ends == sorted(whole.ends) and all(end <= len(whole.text) for end in whole.ends)
    if not stops and "�" not in whole.text:
        assert whole.text == (TOKENIZER.verbatim if shown else TOKENIZER).decode(tokens)
    if not include and not least:
        assert not any(stop in whole.text for stop in stops)


def test_a_pooled_answer_is_what_its_last_start_has_sent():
    sequence = Sequence(number=1, prompt_length=4, tokens=[0] * 4, adapter=Adapter(""), max_new_tokens=0)
    output = SequenceOutput(sequence, TOKENIZER, StopMatcher(()), asyncio.Event())
    output.pool([1, 2], begin=0, last=False)
    output.pool([3, 4], begin=2, last=False)
    output.pool([5], begin=0, last=False)  # it was preempted
    output.pool([6, 7, 8], begin=1, last=True)
    assert list(output.pooled) == [5, 6, 7, 8] and output.finish_reason is FinishReason.LENGTH
