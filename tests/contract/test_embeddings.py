"""Embeddings through the unmodified clients; their values are tested over gRPC."""

from collections.abc import Callable
from math import hypot
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from loraplex import Client
from tests.e2e.processes import Server


def test_openais_client_embeds_texts_and_token_ids(client: OpenAI, server: Server, model: Path):
    with Client(server.address) as grpc_client:
        expected = grpc_client.embed(["Hello", [1, 2, 3]])
    for encoding in (openai.NOT_GIVEN, "float", "base64"):  # without this field, the client requests base64
        hello = client.embeddings.create(model=str(model), input="Hello", encoding_format=encoding)
        values = hello.data[0].embedding
        if encoding == "base64":
            assert isinstance(values, str)
        else:
            assert values == pytest.approx(expected[0].values, abs=1e-5)
    assert hello.usage.prompt_tokens == hello.usage.total_tokens == 5
    (tokens,) = client.embeddings.create(model=str(model), input=[1, 2, 3]).data
    several = client.embeddings.create(model=str(model), input=[[1, 2, 3], [4]]).data
    assert tokens.embedding == pytest.approx(expected[1].values, abs=1e-5)
    assert [found.index for found in several] == [0, 1]
    assert several[0].embedding == pytest.approx(tokens.embedding, abs=1e-5)


def test_vectors_are_shortened_where_the_models_config_allows_it(client: OpenAI, model: Path):
    (whole,) = client.embeddings.create(model=str(model), input="Hello").data
    (short,) = client.embeddings.create(model=str(model), input="Hello", dimensions=8).data
    length = hypot(*whole.embedding[:8])
    assert short.embedding == pytest.approx([value / length for value in whole.embedding[:8]], abs=1e-5)


def test_the_model_names_the_adapter(client: OpenAI, server: Server, model: Path):
    with Client(server.address) as grpc_client:
        (expected,) = grpc_client.embed("Hi", adapter="first")
    for name in ("first", f"{model}:first"):
        (found,) = client.embeddings.create(model=name, input=["Hi"]).data
        assert found.embedding == pytest.approx(expected.values, abs=1e-5)
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="absent", input="Hi")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["Hi", "x" * 9000]}, "input"),
        ({"input": "Hi", "dimensions": 9}, "dimensions"),
        ({"input": [[1, 999]]}, "input"),
        ({"input": "Hi", "extra_body": {"normalize": False}}, "use_activation"),
    ],
)
def test_input_that_cannot_be_embedded_is_a_bad_request(
    client: OpenAI, model: Path, fields: dict[str, object], wrong: str
):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=str(model), **fields)
    assert caught.value.param == wrong


def test_lorax_client_embeds(run_script: Callable[[str], None]):
    run_script(
        """
import sys
from lorax import Client
found = Client(sys.argv[1]).embed("Hello").embeddings
assert abs(sum(value * value for value in found) - 1) < 1e-4, found
"""
    )
