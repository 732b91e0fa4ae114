"""Names, versions and aliases through a running server, whose registry changes, and adapters that are uploaded."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import requests

from loraplex import (
    AdapterConflictError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterState,
    Client,
    MergedAdapters,
)
from loraplex_router.adapters.registry_content import read_registry
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
    with Server(str(model), "--tp=2", f"--adapters={adapters}", f"--adapter-registry={file}") as running:
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


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


def test_an_upload_answers_as_the_same_adapter_does_from_a_folder(server: Server, adapters: Path) -> None:
    with Client(server.address) as client:
        expected = {name: client.generate("Hi", adapter=name, **OPTIONS).text for name in ("r4", "r12", "r16")}
        first = client.upload_adapter("policy", read(adapters / "r4"), expected_version=0)
        assert first.id.startswith("policy@")
        stream = client.stream("Hi", adapter="policy", max_new_tokens=400, ignore_eos=True)
        piece = next(stream)
        for name in ("r12", "r16"):
            client.upload_adapter("policy", read(adapters / name))
            answer = client.generate("Hi", adapter="policy", **OPTIONS)
            assert answer.text == expected[name]
            assert answer.adapter_version != piece.adapter_version == first.id
        text = piece.text + "".join(later.text for later in stream)
        assert text.startswith(expected["r4"])
        with pytest.raises(AdapterConflictError):
            client.upload_adapter("policy", read(adapters / "r4"), expected_version=int(first.id.partition("@")[2]))
        with pytest.raises(AdapterConflictError, match="'half' is an alias"):
            client.upload_adapter("half", read(adapters / "r4"))
        with pytest.raises(AdapterInvalidError, match=r"adapter_config\.json is missing"):
            client.upload_adapter("other", {"adapter_model.safetensors": b"x"})
        client.upload_adapter("policy", read(adapters / "r8"))
        merged = [
            client.generate("Hi", adapter=MergedAdapters([name, "attention"]), **OPTIONS).text
            for name in ("policy", "r8")
        ]
        assert merged[0] == merged[1]
        client.remove_adapter("policy")
        with pytest.raises(AdapterNotFoundError):
            client.generate("Hi", adapter="policy", **OPTIONS)


def refused_before_it_is_sent(server: Server, size: int) -> int:
    host, _, port = server.url.removeprefix("http://").partition(":")
    with closing(HTTPConnection(host, int(port), timeout=60)) as connection:
        connection.putrequest("POST", "/adapters/upload?name=huge")
        connection.putheader("Content-Length", str(size))
        connection.endheaders()
        with connection.getresponse() as response:
            return response.status


def test_a_form_uploads_an_adapter_over_http(server: Server, adapters: Path) -> None:
    files = [("files", (name, data)) for name, data in read(adapters / "r4").items()]
    url = f"{server.url}/adapters/upload?name=formed"
    answer = requests.post(f"{url}&expected_version=0", files=files, timeout=60)
    assert (answer.status_code, answer.json()["source"]) == (200, "upload")
    body = {"model": "formed", "prompt": "Hi", "max_tokens": 2}
    completion = requests.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert completion.headers["x-adapter-version"] == answer.json()["id"]
    assert requests.post(f"{url}&expected_version=0", files=files, timeout=60).status_code == 409
    assert requests.post(url, data=iter([b"x"]), timeout=60).status_code == 422  # its size is not known
    assert refused_before_it_is_sent(server, 2**40) == 422
    assert requests.post(f"{server.url}/adapters/remove", json={"name": "formed"}, timeout=60).status_code == 200
    assert requests.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 404


def test_a_version_that_is_registered_through_the_api_is_in_the_file(
    server: Server, adapters: Path, file: Path
) -> None:
    with Client(server.address) as client:
        registered = client.register_adapter("made", "r1", expected_version=0)
        assert registered.id == "made@1"
        with pytest.raises(AdapterConflictError):
            client.register_adapter("made", "r4", expected_version=0)
        client.set_alias("now", {"made@1": 100}, expected={})
        assert client.generate("Hi", adapter="now", **OPTIONS).adapter_digest == registered.digest
        body = {"name": "made", "id": "r4", "expected_version": 1}
        answer = requests.post(f"{server.url}/adapters/register", json=body, timeout=60)
        assert (answer.status_code, answer.json()["id"]) == (200, "made@2")
        load = {"lora_name": "made", "lora_path": str(adapters / "r12")}
        refused = requests.post(f"{server.url}/v1/load_lora_adapter", json=load, timeout=60)
        assert refused.status_code == 409 and "set load_inplace" in refused.text
        load["load_inplace"] = True
        assert requests.post(f"{server.url}/v1/load_lora_adapter", json=load, timeout=60).status_code == 200
        assert (
            client.generate("Hi", adapter="made", **OPTIONS).text
            == client.generate("Hi", adapter="r12", **OPTIONS).text
        )
        body = {"name": "now", "targets": {"made": 100}, "expected": {"made@2": 100}}
        assert requests.post(f"{server.url}/adapters/alias", json=body, timeout=60).status_code == 409
    assert read_registry(file).names["made"][1].digest == registered.digest


def test_a_name_that_vllms_route_unloads_is_gone_and_can_be_loaded_again(server: Server, adapters: Path) -> None:
    def post(path: str, **body: object) -> int:
        return requests.post(f"{server.url}/v1/{path}", json=body, timeout=60).status_code

    for name in ("r4", "r12"):
        assert post("load_lora_adapter", lora_name="mine", lora_path=str(adapters / name)) == 200
        assert post("completions", model="mine", prompt="Hi", max_tokens=1) == 200
        assert post("unload_lora_adapter", lora_name="mine") == 200
        assert post("completions", model="mine", prompt="Hi", max_tokens=1) == 404
        assert post("unload_lora_adapter", lora_name="mine") == 404


def test_the_command_registers_aliases_uploads_and_removes(server: Server, adapters: Path) -> None:
    def adapters_command(*arguments: str) -> str:
        command = [sys.executable, "-m", "loraplex.cli.main", "adapters", *arguments, "--server", server.address]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert "Registered typed@1" in adapters_command("register", "typed", "r16")
    adapters_command("alias", "typed-canary", "typed@1=60", "sql@1=40")
    assert "Uploaded sent@" in adapters_command("upload", "sent", str(adapters / "dora"))
    listed = adapters_command("list")
    assert "stands for typed@1 (60 %) or sql@1 (40 %)" in listed and "sent@" in listed
    for name in ("typed-canary", "typed", "sent"):
        adapters_command("remove", name)
    assert "typed" not in adapters_command("list")
