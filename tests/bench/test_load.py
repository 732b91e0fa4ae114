import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load import LoadError, Request, Workload, measure, percentile


class Recorder:
    """A target that records its requests, and answers each in the given pieces."""

    def __init__(self, *pieces: int) -> None:
        self.pieces = pieces
        self.requests: list[Request] = []
        self.running = 0
        self.most_running = 0

    async def adapters(self) -> list[str]:
        return []

    async def generate(self, request: Request) -> AsyncIterator[int]:
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        for piece in self.pieces:
            await asyncio.sleep(0)
            yield piece
        self.running -= 1

    async def close(self) -> None:
        pass


def workload(adapters: tuple[str, ...] = ()) -> Workload:
    return Workload(
        concurrency=3, requests=10, prompt_tokens=5, output_tokens=6, adapters=adapters, vocab_size=100, seed=0
    )


async def test_the_loop_is_closed_at_its_concurrency() -> None:
    target = Recorder(1, 1, 1, 1, 1, 1)
    await measure(target, workload(), 0)
    assert target.most_running == 3
    assert len(target.requests) == 3 + 10  # warm-up, measured


async def test_only_what_follows_the_warm_up_is_measured() -> None:
    run = await measure(Recorder(1, 2, 0, 3), workload(), 0)
    assert run.output_tokens == 60
    assert len(run.first_tokens) == 10
    assert len(run.gaps) == 50
    assert run.duration > 0


async def test_tokens_that_arrive_with_the_first_have_no_gap() -> None:
    assert (await measure(Recorder(6), workload(), 0)).gaps == [0.0] * 50


async def test_an_answer_of_another_length_is_an_error() -> None:
    with pytest.raises(LoadError, match="5 tokens arrived instead of 6"):
        await measure(Recorder(5), workload(), 0)


def test_requests_take_the_adapters_in_turn() -> None:
    names = [request.adapter for request in workload(("a", "b", "c")).measured(0)]
    assert names == ["a", "b", "c"] * 3 + ["a"]
    assert {request.adapter for request in workload().measured(0)} == {None}


def test_the_warm_up_uses_every_adapter() -> None:
    names = ("a", "b", "c", "d", "e")
    assert [request.adapter for request in workload(names).warm_up(0)] == list(names)


def test_prompts_are_repeatable_and_all_different() -> None:
    prompts = [request.prompt for run in (0, 1) for request in [*workload().warm_up(run), *workload().measured(run)]]
    again = [request.prompt for run in (0, 1) for request in [*workload().warm_up(run), *workload().measured(run)]]
    assert prompts == again
    assert len({tuple(prompt) for prompt in prompts}) == 26
    assert all(len(prompt) == 5 and max(prompt) < 100 for prompt in prompts)


@given(st.lists(st.floats(0, 1), min_size=1), st.integers(1, 100))
def test_a_percentile_is_a_value_that_few_enough_values_exceed(values: list[float], percent: int) -> None:
    result = percentile(values, percent)
    assert result in values
    assert sum(value <= result for value in values) * 100 >= percent * len(values)
    assert sum(value < result for value in values) * 100 < percent * len(values)
