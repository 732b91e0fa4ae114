"""Answers that are values of a Python type."""

from dataclasses import dataclass
from decimal import Decimal
from threading import Thread
from typing import Annotated

import pytest
from pydantic import BaseModel, Field, field_validator

from loraplex import AnswerError, AsyncClient, Client, FinishReason
from loraplex_protos import generation_pb2 as pb
from tests.client.scripted import ScriptedServicer, answer


class Person(BaseModel):
    name: str
    age: Annotated[int, Field(description="In years")]

    @field_validator("name")
    @classmethod
    def is_a_name(cls, name: str) -> str:
        if not name.istitle():
            raise ValueError("begins with a capital letter")
        return name


@dataclass
class Point:
    x: float
    y: float = 0


ADA = '{"name": "Ada", "age": 36}'


def test_the_answer_is_an_instance(client: Client, servicer: ScriptedServicer) -> None:
    servicer.answers = [answer(ADA)]
    answered = client.parse("Who?", Person, max_new_tokens=50)
    assert answered.parsed == Person(name="Ada", age=36)
    assert (answered.text, answered.request_id) == (ADA, "r-1")
    (request,) = servicer.requests
    assert isinstance(request, pb.GenerateRequest)
    assert request.stopping.max_new_tokens == 50
    assert '"age": {"description": "In years", "type": "integer"}' in request.grammar.json_schema


def test_a_dataclass_is_a_type_too(client: Client, servicer: ScriptedServicer) -> None:
    servicer.answers = [answer('{"x": 1.5}')]
    assert client.parse("Where?", Point).parsed == Point(1.5)


def test_each_sequence_is_an_instance(client: Client, servicer: ScriptedServicer) -> None:
    servicer.words = [ADA]
    with pytest.raises(AnswerError, match=r"cut off \(finish reason length\)"):
        client.parse("Who?", Person, n=2)
    servicer.answers = [answer(ADA)]
    assert client.parse("Who?", Person).values == (Person(name="Ada", age=36),)


def test_a_stream_ends_with_the_instance(client: Client, servicer: ScriptedServicer) -> None:
    servicer.answers = [answer(ADA)]
    *pieces, last = client.stream_parsed("Who?", Person)
    assert "".join(piece.text for piece in pieces) == ADA
    assert {piece.parsed for piece in pieces} == {None}
    assert last.parsed == Person(name="Ada", age=36)


@pytest.mark.parametrize("reason", ["LENGTH", "STOP_TEXT", "CANCELLED"])
def test_an_answer_that_was_cut_off_is_an_error(reason: str, client: Client, servicer: ScriptedServicer) -> None:
    servicer.answers = [answer('{"name": "A', finish_reason=reason)] * 2
    with pytest.raises(AnswerError, match="cut off") as raised:
        client.parse("Who?", Person)
    assert (raised.value.text, raised.value.finish_reason) == ('{"name": "A', FinishReason(reason.lower()))
    with pytest.raises(AnswerError, match="cut off"):
        list(client.stream_parsed("Who?", Person))


def test_what_only_the_type_can_refuse_is_an_error(client: Client, servicer: ScriptedServicer) -> None:
    servicer.answers = [answer('{"name": "ada", "age": 36}')]
    with pytest.raises(AnswerError, match=r"not a Person: name: Value error, begins with a capital letter$"):
        client.parse("Who?", Person)


async def test_asyncio_has_the_same(async_client: AsyncClient, servicer: ScriptedServicer) -> None:
    servicer.answers = [answer(ADA), answer(ADA)]
    assert (await async_client.parse("Who?", Person)).parsed.age == 36
    pieces = [piece async for piece in async_client.stream_parsed("Who?", Person)]
    assert pieces[-1].parsed == Person(name="Ada", age=36)


def test_a_grammar_beside_the_type_is_refused(client: Client) -> None:
    with pytest.raises(TypeError, match="grammar"):
        client.parse("Who?", Person, grammar=None)  # type: ignore[call-arg]


def test_the_error_has_what_the_server_warned_of(client: Client, servicer: ScriptedServicer) -> None:
    servicer.warnings = ["pattern is not enforced"]
    servicer.answers = [answer('{"name": 7, "age": 36}')] * 2
    told = r"not a Person: name: Input should be a valid string; pattern is not enforced$"
    with pytest.raises(AnswerError, match=told):
        client.parse("Who?", Person)
    with pytest.raises(AnswerError, match=told):
        list(client.stream_parsed("Who?", Person))


def test_a_decimal_is_a_number(client: Client, servicer: ScriptedServicer) -> None:
    servicer.answers = [answer("1.50")]
    assert client.parse("How much?", Decimal).parsed == Decimal("1.5")
    (request,) = servicer.requests
    assert request.grammar.json_schema == '{"type": "number"}'


def test_a_type_that_json_does_not_have_is_refused(client: Client) -> None:
    with pytest.raises(TypeError, match=r"Thread.* cannot be described"):
        client.parse("Who?", Thread)
