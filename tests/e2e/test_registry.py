"""Names, versions and aliases through a running server, whose registry changes."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from loraplex import AdapterNotFoundError, AdapterState, Client
from tests.e2e.processes import Server

OPTIONS = {"max_new_tokens": 6, "ignore_eos": True}
FIRST = {"adapters": {"sql": {1: {"id": "r8"}}}, "aliases": {"half": {"sql@1": 100}}}
SECOND = {
    "adapters": {"sql": {1: {"id": "r8"}, 2: {"id": "r64", "source": "local"}}},
    "aliases": {"half": {"sql@1": 50, "sql@2": 50}},
}


def write(path: Path, content: object) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content))
    new.replace(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("registry") / "registry.json"
    write(path, FIRST)
    return path


@pytest.fixture(scope="module")
def server(model: Path, adapters: Path, file: Path) -> Iterator[Server]:
    with Server(str(model), f"--adapters={adapters}", f"--adapter-registry={file}") as running:
        yield running


def test_a_new_version_of_a_name_answers_once_the_file_has_it(server: Server, file: Path) -> None:
    with Client(server.address) as client:
        first = client.generate("Hi", adapter="sql", **OPTIONS)
        assert (first.adapter_version, first.sequences[0].adapter) == ("sql@1", "sql")
        assert first.text == client.generate("Hi", adapter="r8", **OPTIONS).text
        with pytest.raises(AdapterNotFoundError, match="its versions: 1"):
            client.generate("Hi", adapter="sql@2", **OPTIONS)
        write(file, SECOND)
        deadline = time.monotonic() + 60
        while (second := client.generate("Hi", adapter="sql", **OPTIONS)).adapter_version == "sql@1":
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert second.adapter_version == "sql@2"
        assert second.text == client.generate("Hi", adapter="r64", **OPTIONS).text != first.text
        assert client.generate("Hi", adapter="sql@1", **OPTIONS).text == first.text
        states = {adapter.id: adapter.state for adapter in client.adapters()}
        assert (states["sql"], states["sql@1"], states["half"]) == (
            AdapterState.ALIAS,
            AdapterState.LOADED,
            AdapterState.ALIAS,
        )


def test_a_session_gets_one_version_over_http_and_grpc(server: Server) -> None:
    found = set()
    for number in range(12):
        session = f"session {number}"
        body = {"model": "half", "prompt": ["Hi", "Ho"], "max_tokens": 2}
        headers = {"Content-Type": "application/json", "X-Session-Id": session}
        request = Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers)
        with urlopen(request, timeout=60) as response:
            version = response.headers["X-Adapter-Version"]
            assert json.load(response)["model"] == "half" and len(response.headers["X-Adapter-Digest"]) == 64
        with Client(server.address) as client:
            assert client.generate("Hi", adapter="half", session=session, **OPTIONS).adapter_version == version
            assert client.embed(["Hi"], adapter="half", session=session)[0].adapter_version == version
        found.add(version)
    assert found == {"sql@1", "sql@2"}
