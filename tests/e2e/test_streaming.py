"""What clients see in a stream: whole characters, stop strings, seeds, logprobs, several sequences."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex import AsyncClient, Client, FinishReason, InvalidRequestError
from tests.e2e.processes import Server
from tests.e2e.tiny import CHANT, Oracle, byte_tokenizer


@pytest.fixture(scope="module")
def chanting(chanting_model: Path) -> Iterator[Server]:
    with Server(str(chanting_model), "--kv-blocks=256", "--threads=1") as running:
        yield running
        running.assert_nothing_is_held()


@pytest.fixture
def chant(chanting: Server) -> Iterator[Client]:
    with Client(chanting.address) as client:
        yield client


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def test_no_piece_of_a_stream_splits_a_character(chant: Client):
    pieces = list(chant.stream(CHANT, max_new_tokens=33))
    text = "".join(piece.text for piece in pieces)
    assert text == CHANT * 3
    assert len(pieces) > 5
    assert [token.id for piece in pieces for token in piece.tokens] == byte_tokenizer().encode(CHANT) * 3


def test_a_character_cut_by_the_token_limit_is_shown_as_replacement(chant: Client):
    whole = chant.generate(CHANT, max_new_tokens=5)
    assert whole.text == "aé\ufffd" and whole.sequences[0].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("stop", "shown"), [("€😀", "aé"), ("é", "a"), ("a", ""), ("za", "aé€😀"), ("€x", CHANT * 2)])
def test_text_ends_before_a_stop_string_and_no_part_of_it_is_sent(chant: Client, stop: str, shown: str):
    pieces = list(chant.stream(CHANT, max_new_tokens=22, stop=[stop]))
    assert "".join(piece.text for piece in pieces) == shown
    assert "".join(byte_tokenizer().decode([t.id for piece in pieces for t in piece.tokens])) == shown
    stopped = stop in CHANT * 2
    assert pieces[-1].finish_reason is (FinishReason.STOP_TEXT if stopped else FinishReason.LENGTH)


def test_a_stop_token_ends_a_sequence_and_is_reported_as_a_token(chant: Client):
    end = byte_tokenizer().encode("z")[0]
    sequence = chant.generate(CHANT, max_new_tokens=50, stop_token_ids=[end]).sequences[0]
    assert sequence.finish_reason is FinishReason.END_TOKEN
    assert sequence.text == "aé€😀" and sequence.tokens[-1].id == end


async def test_the_same_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(server: Server):
    async with AsyncClient(server.address) as client:
        options = {"max_new_tokens": 24, "temperature": 1.0, "ignore_eos": True}
        alone = await client.generate("seeded", adapter="r8", seed=7, **options)
        noise = [client.generate(f"noise {i}", adapter="r4", top_k=20, seed=i, **options) for i in range(10)]
        crowded, other, *_ = await asyncio.gather(
            client.generate("seeded", adapter="r8", seed=7, **options),
            client.generate("seeded", adapter="r8", seed=8, **options),
            *noise,
        )
    assert crowded.text == alone.text != other.text
    assert alone.sequences[0].seed == 7


def test_n_sequences_of_one_prompt_use_consecutive_seeds(client: Client):
    options = {"max_new_tokens": 8, "temperature": 1.0, "ignore_eos": True}
    together = client.generate("several " * 10, n=3, seed=20, **options)
    for index, sequence in enumerate(together.sequences):
        assert sequence.seed == 20 + index
        assert sequence.tokens == client.generate("several " * 10, seed=20 + index, **options).sequences[0].tokens
    assert len({sequence.text for sequence in together.sequences}) == 3


def test_logprobs_alternatives_and_prompt_logprobs_equal_the_references(client: Client, oracle: Oracle):
    prompt = byte_tokenizer().encode("Logprobs, please: " * 20)
    answer = client.generate(
        prompt, adapter="r12", max_new_tokens=4, ignore_eos=True, top_logprobs=3, prompt_top_logprobs=2
    )
    tokens, logprobs = oracle.generate(prompt, "r12", 4)
    assert [token.id for token in answer.sequences[0].tokens] == tokens
    assert [token.logprob for token in answer.sequences[0].tokens] == pytest.approx(logprobs, abs=2e-3)
    for token in answer.sequences[0].tokens:
        assert len(token.alternatives) == 3
        assert (token.alternatives[0].id, token.alternatives[0].logprob) == (token.id, token.logprob)
    assert [token.id for token in answer.prompt] == prompt
    assert answer.prompt[0].logprob is None
    expected = oracle.prompt_logprobs(prompt, "r12")
    assert [token.logprob for token in answer.prompt[1:]] == pytest.approx(expected, abs=2e-3)
    assert answer.prompt[0].alternatives == ()
    for token in answer.prompt[1:]:
        best, second = token.alternatives
        assert best.logprob >= max(second.logprob, token.logprob)
        assert token.id != best.id or token.logprob == best.logprob


def test_a_repeated_prompt_hits_the_cache_with_the_same_answer_but_not_across_adapters(client: Client):
    prompt = "A long prompt that fills several blocks of the cache. " * 4
    options = {"max_new_tokens": 8, "ignore_eos": True}
    first = client.generate(prompt, adapter="r16", **options)
    again = client.generate(prompt, adapter="r16", **options)
    other = client.generate(prompt, adapter="r64", **options)
    assert first.sequences[0].usage.cached_tokens == 0
    assert again.sequences[0].usage.cached_tokens > 100
    assert again.text == first.text
    assert other.sequences[0].usage.cached_tokens == 0


def test_token_ids_are_used_as_they_are_and_a_chat_is_rendered(client: Client):
    text = client.generate("<user>hi<assistant>", max_new_tokens=5)
    ids = client.generate(byte_tokenizer().encode("<user>hi<assistant>"), max_new_tokens=5)
    chat = client.generate([{"role": "user", "content": "hi"}], max_new_tokens=5)
    assert text.text == ids.text == chat.text


def test_tokenize_returns_each_tokens_position(client: Client):
    spans = client.tokenize("aé")
    assert [(span.text, span.start, span.stop) for span in spans] == [("a", 0, 1), ("é", 1, 2), ("é", 1, 2)]


def test_every_invalid_field_is_named_before_anything_starts(client: Client):
    with pytest.raises(InvalidRequestError) as caught:
        next(client.stream("x", top_p=1.5, repetition_penalty=0.0, n=1000, stop=[""], top_logprobs=100))
    fields = {violation.field for violation in caught.value.violations}
    assert fields == {"sampling.top_p", "sampling.repetition_penalty", "n", "stopping.stop", "detail.top_logprobs"}


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("", {}, "prompt"),
        ([300], {}, "token_ids"),
        ("x" * 9000, {}, "prompt"),
        ("x", {"max_new_tokens": 100_000}, "stopping.max_new_tokens"),
        ("x", {"request_id": "not allowed"}, "request_id"),
        ("x", {"temperature": float("nan")}, "sampling.temperature"),
        ("x", {"stop_token_ids": [5000]}, "stopping.stop_token_ids"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_with_its_field(client: Client, prompt, options, field):
    with pytest.raises(InvalidRequestError) as caught:
        client.generate(prompt, **options)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_without_max_new_tokens_a_sequence_continues_to_the_end_of_the_context(chant: Client):
    usage = chant.generate("a" * 2000).sequences[0].usage
    assert usage.prompt_tokens + usage.generated_tokens == 2048
