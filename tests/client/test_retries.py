"""Calls that are tried again."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex import (
    AsyncClient,
    Client,
    InvalidRequestError,
    LoraplexError,
    OverloadedError,
    RateLimitedError,
    UnavailableError,
)
from loraplex.retries import LONGEST_PAUSE, LONGEST_WISH, Attempts
from tests.client.scripted import ScriptedServicer

SOON = 0.01  # seconds
FAILURES = [UnavailableError("starting"), OverloadedError("full", SOON), RateLimitedError("limit", SOON)]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex.retries.FIRST_PAUSE", SOON)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.generate("Hi"),
        lambda client: list(client.stream("Hi")),
        lambda client: client.tokenize("Hi"),
        lambda client: client.adapters(),
        lambda client: client.info(),
    ],
)
def test_a_call_that_changes_nothing_is_tried_again(
    call: Callable[[Client], object], failure: LoraplexError, client: Client, servicer: ScriptedServicer
) -> None:
    servicer.failures = [failure]
    call(client)
    assert len(servicer.requests) == 2


async def test_calls_with_asyncio_are_tried_again(async_client: AsyncClient, servicer: ScriptedServicer) -> None:
    servicer.failures = [*FAILURES[:2]]
    assert (await async_client.info()).model_id == "tiny"
    servicer.failures = [*FAILURES[1:]]
    assert len([piece async for piece in async_client.stream("Count")]) == 4
    assert len(servicer.requests) == 6


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.load_adapter("sql"),
        lambda client: client.unload_adapter("sql"),
        lambda client: client.cancel("r-1"),
    ],
)
def test_a_call_that_may_have_had_an_effect_is_not_tried_again(
    call: Callable[[Client], object], client: Client, servicer: ScriptedServicer
) -> None:
    servicer.failures = [UnavailableError("draining")]
    with pytest.raises(UnavailableError, match="draining"):
        call(client)
    assert len(servicer.requests) == 1


@pytest.mark.parametrize("failure", FAILURES)
async def test_an_answer_that_has_begun_is_not_tried_again(
    failure: LoraplexError, client: Client, async_client: AsyncClient, servicer: ScriptedServicer
) -> None:
    servicer.failure_after_first_piece = failure
    with pytest.raises(type(failure), match=failure.message):
        await async_client.generate("Count")
    with pytest.raises(type(failure), match=failure.message):
        list(client.stream("Count"))
    with pytest.raises(type(failure), match=failure.message):
        client.generate("Count")
    assert len(servicer.requests) == 3


@pytest.mark.parametrize("failure", FAILURES)
def test_a_stream_that_has_begun_is_resumed(failure: LoraplexError, client: Client, servicer: ScriptedServicer) -> None:
    servicer.resumable, servicer.failure_after_first_piece = True, failure
    pieces = list(client.stream("Count", max_new_tokens=7))
    assert [piece.text for piece in pieces] == [" one", " two", " three", " one", " two", " three", " one", ""]
    assert [request.resume_token for request in servicer.requests] == ["", *map(str, range(1, 8))]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_stream_that_was_resumed_once_is_not_resumed_where_it_was_before(
    failure: LoraplexError, client: Client, servicer: ScriptedServicer
) -> None:
    servicer.resumable, servicer.failure_after_first_piece = True, failure
    stream = client.stream("Count", max_new_tokens=7)
    assert next(stream).text == " one"
    servicer.resumable = False
    assert next(stream).text == " two"
    with pytest.raises(type(failure), match=failure.message):
        next(stream)
    assert [request.resume_token for request in servicer.requests] == ["", "1"]


def test_other_errors_are_not_tried_again(client: Client, servicer: ScriptedServicer) -> None:
    servicer.failures = [LoraplexError("a bug")]
    with pytest.raises(LoraplexError, match="a bug"):
        client.generate("Hi")
    assert len(servicer.requests) == 1


def test_a_request_that_is_too_large_is_not_sent_again(client: Client, servicer: ScriptedServicer) -> None:
    with pytest.raises(InvalidRequestError, match="request: is larger than"):
        client.generate("x" * 2**23)
    assert servicer.requests == []


@pytest.mark.parametrize("max_retries", [0, 1, 5])
def test_the_last_failure_is_raised(max_retries: int, address: str, servicer: ScriptedServicer) -> None:
    servicer.failures = [OverloadedError("full", SOON)] * 10
    with Client(address, max_retries=max_retries) as client, pytest.raises(OverloadedError, match="full"):
        client.info()
    assert len(servicer.requests) == max_retries + 1


@pytest.mark.parametrize("call", [Client.generate, lambda *args, **options: list(Client.stream(*args, **options))])
def test_the_failure_is_raised_at_once_if_the_timeout_comes_first(
    call: Callable[..., object], client: Client, servicer: ScriptedServicer
) -> None:
    servicer.failures = [OverloadedError("full", 30)]
    with pytest.raises(OverloadedError, match="full"):
        call(client, "Hi", timeout=20)
    assert len(servicer.requests) == 1


@pytest.mark.parametrize("max_retries", [-1, 1.5, math.nan, math.inf])
def test_what_is_no_number_of_retries_is_refused(max_retries: Any, address: str) -> None:
    with pytest.raises(ValueError, match="max_retries must be a whole number"):
        Client(address, max_retries=max_retries)


@pytest.mark.parametrize("timeout", [1e9, 1e300, math.inf])
async def test_a_timeout_beyond_a_year_is_no_limit(timeout: float, client: Client, async_client: AsyncClient) -> None:
    assert Attempts("localhost", 0, timeout).timeout is None
    assert client.info(timeout=timeout).model_id == "tiny"
    assert (await async_client.info(timeout=timeout)).model_id == "tiny"


def test_a_timeout_that_is_no_number_is_refused(client: Client, servicer: ScriptedServicer) -> None:
    with pytest.raises(ValueError, match="timeout must be a number"):
        client.info(timeout=math.nan)
    with pytest.raises(ValueError, match="timeout must be a number"):
        list(client.stream("Hi", timeout=math.nan))
    assert servicer.requests == []


class Failure(grpc.RpcError):
    """As gRPC itself raises it. A call that a stopping server has not begun is `CANCELLED`."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._code.name

    def trailing_metadata(self) -> tuple[()]:
        return ()

    initial_metadata = trailing_metadata


@given(
    code=st.sampled_from([grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED]),
    timeout=st.none() | st.floats(0, 100),
    max_retries=st.integers(0, 20),
)
def test_pauses_grow_up_to_a_limit_and_end_before_the_timeout(
    code: grpc.StatusCode, timeout: float | None, max_retries: int
) -> None:
    attempts = Attempts("localhost", max_retries, timeout)
    pauses = list[float]()
    with pytest.raises(UnavailableError):
        while True:
            pauses.append(attempts.pause(Failure(code)))
            assert attempts.timeout is None or pauses[-1] < attempts.timeout
    assert timeout is not None or len(pauses) == max_retries
    assert all(0 < pause <= 1.25 * LONGEST_PAUSE <= LONGEST_WISH for pause in pauses)
    assert all(later >= earlier or later >= LONGEST_PAUSE for earlier, later in pairwise(pauses))
