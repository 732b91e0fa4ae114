"""API keys through a running server: over gRPC, HTTP and the commands."""

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex import (
    AdapterForbiddenError,
    Client,
    ForbiddenError,
    MergedAdapters,
    RateLimitedError,
    RequestNotFoundError,
    UnauthenticatedError,
)
from tests.e2e.processes import Server, run

KEYS = {name: f"the-key-of-{name}" for name in ("plain", "busy", "chatty", "admin")}
TENANTS = {
    "plain": {"adapters": ["r*"]},
    "busy": {"max_requests": 1},
    "chatty": {"tokens_per_minute": 20},
    "admin": {"admin": True},
}
OPTIONS = {"max_new_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def guarded(model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    hashes = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
    file.write_text(json.dumps({"tenants": {name: {**TENANTS[name], "keys": [hashes[name]]} for name in KEYS}}))
    flags = f"--adapters={adapters}", "--kv-blocks=512", "--threads=1", f"--api-keys={file}"
    with Server(str(model), *flags) as running:
        yield running
        running.assert_nothing_is_held()
        assert not any(key in running.log for key in KEYS.values())


def client_of(server: Server, name: str) -> Client:
    return Client(server.address, api_key=KEYS[name], max_retries=0)


@pytest.mark.parametrize("key", [None, "wrong"])
def test_no_call_is_answered_without_a_key(guarded: Server, key: str | None) -> None:
    with Client(guarded.address, api_key=key) as client:
        for call in (
            lambda: client.generate("Hi", **OPTIONS),
            lambda: next(client.stream("Hi", **OPTIONS)),
            lambda: client.embed("Hi"),
            lambda: client.cancel("any"),
            lambda: client.tokenize("Hi"),
            lambda: client.adapters(),
            lambda: client.load_adapter("r1"),
            lambda: client.unload_adapter("r1"),
            lambda: client.info(),
        ):
            with pytest.raises(UnauthenticatedError):
                call()


def test_a_tenant_uses_its_adapters_and_sees_no_others(guarded: Server) -> None:
    with client_of(guarded, "plain") as client:
        assert client.generate("Hi", **OPTIONS).text
        assert client.generate("Hi", adapter="r4", **OPTIONS).text
        for adapter in ("attention", MergedAdapters(["r8", "attention"])):
            with pytest.raises(ForbiddenError, match="attention") as refusal:
                client.generate("Hi", adapter=adapter, **OPTIONS)
            assert not isinstance(refusal.value, AdapterForbiddenError)
            with pytest.raises(ForbiddenError, match="attention"):
                client.embed("Hi", adapter=adapter)
        assert {adapter.id for adapter in client.adapters()} == {"r1", "r4", "r8", "r12", "r16", "r64"}


def test_only_an_administrator_loads_and_unloads(guarded: Server) -> None:
    with client_of(guarded, "plain") as plain, client_of(guarded, "admin") as admin:
        with pytest.raises(ForbiddenError):
            plain.load_adapter("r1")
        for change in (plain.unload_adapter, plain.pin_adapter, plain.unpin_adapter):
            with pytest.raises(ForbiddenError):
                change("r1")
        admin.load_adapter("r1")
        with pytest.raises(ForbiddenError):
            plain.unload_adapter("r1")
        admin.unload_adapter("r1")


def test_requests_in_flight_are_limited_and_only_their_tenant_can_cancel_them(guarded: Server) -> None:
    with client_of(guarded, "busy") as busy, client_of(guarded, "plain") as plain, client_of(guarded, "admin") as admin:
        stream = busy.stream("Hi", max_new_tokens=4000, ignore_eos=True, request_id="long")
        next(stream)
        with pytest.raises(RateLimitedError) as refusal:
            busy.generate("Hi", **OPTIONS)
        assert refusal.value.retry_after == 1.0
        with pytest.raises(RequestNotFoundError):
            plain.cancel("long")
        admin.cancel("long")
        assert [piece.finish_reason for piece in stream][-1] == "cancelled"
        assert busy.generate("Hi", **OPTIONS).text
        assert len(busy.embed(["one request", "however many inputs"])) == 2


def test_tokens_are_limited_by_their_actual_use(guarded: Server) -> None:
    with client_of(guarded, "chatty") as client:
        client.generate("x" * 60, **OPTIONS)
        with pytest.raises(RateLimitedError, match="20 tokens a minute") as refusal:
            client.generate("Hi", **OPTIONS)
        assert refusal.value.retry_after > 60


def post(server: Server, key: str | None) -> tuple[int, dict[str, str], dict[str, object]]:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    body = json.dumps({"inputs": "Hi", "parameters": {"max_new_tokens": 2, "adapter_id": "r4"}}).encode()
    request = urllib.request.Request(f"{server.url}/generate", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, dict(response.headers), json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), json.load(error)


def test_keys_are_checked_over_http(guarded: Server) -> None:
    status, headers, body = post(guarded, None)
    assert (status, body["error_type"], headers["www-authenticate"]) == (401, "unauthenticated", "Bearer")
    assert post(guarded, KEYS["plain"])[0] == 200  # and the key was not taken for the adapter's token
    assert guarded.health() == 200


def get(
    server: Server, path: str, key: str | None, header: str = "Authorization", scheme: str = "Bearer "
) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(server.url + path, headers={header: f"{scheme}{key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_openais_routes_list_the_models_that_a_key_may_use(guarded: Server, model: Path) -> None:
    status, body = get(guarded, "/v1/models", "wrong")
    assert (status, body["error"]["code"]) == (401, "unauthenticated")
    names = {entry["id"] for entry in get(guarded, "/v1/models", KEYS["plain"])[1]["data"]}
    assert names == {str(model), "r1", "r4", "r8", "r12", "r16", "r64"}


def test_keys_may_be_in_the_header_of_anthropics_clients(guarded: Server) -> None:
    assert [get(guarded, "/v1/models", key, "x-api-key", "")[0] for key in (KEYS["plain"], "wrong")] == [200, 401]


def test_a_limit_over_http_says_when_to_retry(guarded: Server) -> None:
    with client_of(guarded, "busy") as busy:
        stream = busy.stream("Hi", max_new_tokens=4000, ignore_eos=True)
        next(stream)
        status, headers, body = post(guarded, KEYS["busy"])
        stream.close()
    assert (status, headers["retry-after"], body["error_type"]) == (429, "1", "rate_limited")


def test_commands_take_the_key_as_a_flag_or_a_variable(guarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server = f"--server={guarded.address}"
    refused = run("info", server)
    assert refused.returncode == 1 and "--api-key" in refused.stderr
    assert run("info", server, f"--api-key={KEYS['plain']}").returncode == 0
    monkeypatch.setenv("LORAPLEX_API_KEY", KEYS["plain"])
    assert run("adapters", "list", server).returncode == 0


def test_an_invalid_key_file_prevents_the_start(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("tenants: {acme: {keys: [plain text]}}")
    with pytest.raises(AssertionError, match=r"--api-keys: .*tenants.acme.keys.0"):
        Server(str(model), f"--api-keys={file}", "--kv-blocks=64", "--threads=1")
