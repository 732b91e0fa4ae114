"""--served-model-name: the base model's names on OpenAI's routes."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex import Client
from tests.e2e.processes import Server
from tests.e2e.tiny import save_adapter


@pytest.fixture(scope="module")
def named(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    adapters = tmp_path_factory.mktemp("named")
    for name in ("sql", "chat", "dummy"):
        save_adapter(model, adapters / name, 4, seed=1)
    names = "--served-model-name=prod, chat"  # the second is also an adapter's name
    with Server(str(model), names, f"--adapters={adapters}", "--kv-blocks=64", "--threads=1") as running:
        yield running


def call(server: Server, path: str, body: object = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def asked_for(server: Server, model: str) -> tuple[int, str, str]:
    """The status, the answer's `model`, and its text."""
    body = {"model": model, "prompt": "Hi", "max_tokens": 8, "temperature": 0}
    status, answer = call(server, "/v1/completions", body)
    return status, answer.get("model", ""), answer["choices"][0]["text"] if status == 200 else ""


def test_all_names_mean_the_base_and_answers_have_the_first(named: Server):
    base = asked_for(named, "prod")
    assert base[:2] == (200, "prod")
    assert [asked_for(named, name) for name in ("", "chat", "dummy", named.url)] == [base] * 4
    adapters = [asked_for(named, name) for name in ("sql", "prod:sql", "chat:sql")]
    assert [status for status, _, _ in adapters] == [200] * 3
    assert len({text for _, _, text in adapters}) == 1 and adapters[0][2] != base[2]


def test_an_adapter_with_a_models_name_is_requested_after_a_colon(named: Server):
    for name in ("chat", "dummy"):
        assert asked_for(named, f"prod:{name}")[:2] == (200, f"prod:{name}")
        assert asked_for(named, f"prod:{name}")[2] != asked_for(named, name)[2]
    listed = {adapter["id"]: adapter["warnings"] for adapter in call(named, "/adapters")[1]}
    assert "request it as prod:dummy" in listed["dummy"][0] and not listed["sql"]


def test_the_path_of_the_model_is_not_its_name(named: Server, model: Path):
    assert asked_for(named, model.name)[0] == 404


def test_the_names_are_listed_before_the_adapters(named: Server, model: Path):
    listed = call(named, "/v1/models")[1]["data"]
    assert [(card["id"], card["root"], card["parent"]) for card in listed] == [
        ("prod", str(model), None),
        ("chat", str(model), None),
        ("prod:chat", "chat", "prod"),
        ("prod:dummy", "dummy", "prod"),
        ("sql", "sql", "prod"),
    ]
    assert call(named, "/v1/models/chat")[1]["parent"] is None


def test_other_routes_use_the_names(named: Server):
    assert call(named, "/v1/embeddings", {"model": "chat", "input": "Hi"})[1]["model"] == "prod"
    assert call(named, "/tokenize", {"model": "chat", "messages": [{"role": "user", "content": "Hi"}]})[0] == 200
    with Client(named.address) as client:
        assert client.info().served_model_names == ("prod", "chat")
