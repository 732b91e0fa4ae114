"""What clients hide: headers, events on the wire, administration, health, and the OpenAPI document."""

import json
import re
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.contract.conftest import PAGE
from tests.e2e.processes import Server


def call(server: Server, path: str, body: object | bytes | None = None) -> tuple[int, Message, str]:
    """The status, the headers and the text of a POST, or of a GET if there is no body."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def read(server: Server, path: str, body: object | None = None) -> Any:
    status, _, text = call(server, path, body)
    assert status == 200, text
    return json.loads(text)


def test_whole_answers_have_lorax_headers(server: Server):
    parameters = {"max_new_tokens": 3, "adapter_id": "first"}
    status, headers, text = call(server, "/generate", {"inputs": "Hi", "parameters": parameters})
    assert status == 200 and set(json.loads(text)) == {"generated_text"}
    for name in (
        *("compute-time", "queue-time", "inference-time", "total-time", "validation-time"),
        *("time-per-token", "time-to-first-token", "time-per-output-token", "skipped-tokens", "compute-characters"),
    ):
        assert int(headers[f"x-{name}"]) >= 0
    assert (headers["x-prompt-tokens"], headers["x-generated-tokens"]) == ("2", "3")
    assert headers["x-adapter-id"] == "first" and headers["x-model-id"]


def test_streams_end_with_done_on_openais_routes_and_without_on_loraxs(server: Server):
    _, headers, text = call(server, "/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 3}})
    events = [json.loads(event.removeprefix("data: ")) for event in text.strip().split("\n\n")]
    assert len(events) == 3 and headers["content-type"].startswith("text/event-stream")
    assert events[-1]["generated_text"] is not None and events[-1]["details"] is None
    chat = {"model": "first", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "stream": True}
    assert call(server, "/v1/chat/completions", chat)[2].endswith("data: [DONE]\n\n")


def test_the_texts_of_loraxs_tokens_add_up_to_the_prompt_and_the_answer(server: Server):
    asked = {"max_new_tokens": 30, "temperature": 2.0, "seed": 5, "details": True, "decoder_input_details": True}
    answer = read(server, "/generate", {"inputs": "aé😀", "parameters": asked})
    assert [token["text"] for token in answer["details"]["prefill"]] == ["a", "", "é", "", "", "", "😀"]
    tokens = answer["details"]["tokens"]
    assert "".join(token["text"] for token in tokens if not token["special"]) == answer["generated_text"]
    stream = {"inputs": "aé😀", "parameters": {**asked, "decoder_input_details": False}}
    events = call(server, "/generate_stream", stream)[2].strip().split("\n\n")
    assert [json.loads(event.removeprefix("data: "))["token"]["text"] for event in events] == [
        t["text"] for t in tokens
    ]


@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream", "/invocations", "/tokenize"])
@pytest.mark.parametrize("body", [b"{bad", b"\xff", b"[]", b'{"inputs": 5}', b"{}", b'{"inputs": "\\ud800"}'])
def test_malformed_bodies_are_validation_errors_in_lorax_shape(server: Server, path: str, body: bytes):
    status, _, text = call(server, path, body)
    answer = json.loads(text)
    assert status == 422 and answer["error_type"] == "validation" and "`" in answer["error"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("body", [b"{bad", b"\xff", b"[]", b'{"model": 5}', b"{}", b'{"model": "\\ud800"}'])
def test_malformed_bodies_are_bad_requests_in_openais_shape(server: Server, path: str, body: bytes):
    status, _, text = call(server, path, body)
    assert status == 400 and set(json.loads(text)["error"]) == {"message", "type", "param", "code"}


def test_nulls_and_unknown_fields_are_accepted(server: Server):
    nulls = dict.fromkeys(("adapter_id", "best_of", "details", "seed", "stop", "temperature", "truncate", "watermark"))
    body = {"inputs": "Hi", "stream": None, "more": 1, "parameters": {**nulls, "other": 2, "max_new_tokens": 2}}
    assert len(read(server, "/", body)) == 1
    assert len(read(server, "/invocations", {"inputs": "Hi", "parameters": {"max_new_tokens": 1}})) == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "Hi", "parameters": {"max_new_tokens": 1}}),
        ("/embed", {"inputs": "Hi"}),
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 1}),
        ("/v1/embeddings", {"input": "Hi"}),
        ("/score", {"text_1": "Hi", "text_2": "Ho"}),
        ("/rerank", {"query": "Hi", "documents": ["Ho"]}),
    ],
)
def test_a_misspelt_field_is_named_in_a_warning(server: Server, path: str, body: dict[str, Any]):
    status, headers, _ = call(server, path, {**body, "adaptor_id": "first", "user": "me"})
    ignored = "ignored, because it is not a field of this server: 'adaptor_id'"
    assert status == 200 and headers["X-Loraplex-Warning"] == ignored


def test_a_misspelt_parameter_of_loraxs_is_named_in_a_warning(server: Server):
    body = {"inputs": "Hi", "parameters": {"max_new_tokens": 1, "maximum": 5}}
    assert call(server, "/generate", body)[1]["X-Loraplex-Warning"].endswith("'maximum'")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "Hi", "adapter_id": "first"}),
        ("/generate_stream", {"inputs": "Hi", "lora_path": "first"}),
        ("/invocations", {"inputs": "Hi", "adapters": ["first"]}),
        ("/generate", {"inputs": "Hi", "parameters": {"adapter": "first"}}),
        ("/embed", {"inputs": "Hi", "parameters": {"lora_id": "first"}}),
        ("/v1/completions", {"prompt": "Hi", "adapter_id": "first"}),
        ("/v1/completions", {"prompt": "Hi", "adapter_id": "", "lora": [], "lora_name": "first"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "merged_adapters": {"ids": ["a"]}}),
        ("/v1/responses", {"input": "Hi", "lora_request": {"lora_name": "first"}}),
        ("/v1/embeddings", {"input": "Hi", "lora_path": "first"}),
        ("/score", {"text_1": "Hi", "text_2": "Ho", "adapter_id": "first"}),
    ],
)
def test_a_field_that_would_name_an_adapter_elsewhere_is_refused(server: Server, path: str, body: dict[str, Any]):
    """Otherwise the base model would answer in the adapter's place."""
    status, _, answer = call(server, path, body)
    assert status in (400, 422) and "does not name an adapter here: use `model` on /v1" in answer


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/v1/models?limit=0", "`limit` Input should be greater than or equal to 1"),
        ("/adapters?limit=x", "`limit` Input should be a valid integer, unable to parse string as an integer"),
    ],
)
def test_a_wrong_query_parameter_is_named(server: Server, path: str, error: str):
    assert error in call(server, path)[2]


def test_a_body_that_is_too_large_is_refused(server: Server):
    assert call(server, "/generate", b" " * (16 << 20) + b"{}")[0] == 413


def test_info_tokenize_and_health(server: Server):
    assert read(server, "/info")["max_total_tokens"] == 4096
    assert [token["text"] for token in read(server, "/tokenize", {"inputs": "ab"})] == ["a", "b"]
    assert {call(server, path)[0] for path in ("/", "/health", "/ping", "/startup")} == {200}
    assert call(server, "/absent")[0] == 404 and call(server, "/generate")[0] == 405


def test_head_is_answered_like_get(server: Server):
    for path, status in (("/health", 200), ("/v1/models", 200), ("/generate", 405), ("/absent", 404)):
        head = urllib.request.Request(server.url + path, method="HEAD")
        try:
            with urllib.request.urlopen(head, timeout=60) as response:
                found, body = response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                found, body = error.code, error.read()
        assert (found, body) == (status, b"")


@pytest.mark.parametrize("path", ["//v1/models", "/v1//models", "/v1/models/", "//v1//models//"])
def test_slashes_too_many_are_left_out(server: Server, path: str):
    assert read(server, path) == read(server, "/v1/models")


def test_pages_of_a_named_origin_may_send_requests_with_any_header_and_others_may_not(server: Server):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    url = server.url + "/v1/chat/completions"
    preflight = urllib.request.Request(url, None, {"Origin": PAGE, **asked}, method="OPTIONS")
    with urllib.request.urlopen(preflight, timeout=60) as allowed:
        assert allowed.headers["access-control-allow-origin"] == PAGE
        assert {"authorization", "x-stainless-os"} <= set(allowed.headers["access-control-allow-headers"].split(","))
    simple = urllib.request.Request(server.url + "/health", None, {"Origin": PAGE})
    with urllib.request.urlopen(simple, timeout=60) as answered:
        assert answered.headers["access-control-allow-origin"] == PAGE
    foreign = urllib.request.Request(url, b"{}", {"Origin": "https://evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(foreign, timeout=60):
        pass
    assert refused.value.code == 403
    assert json.load(refused.value)["error"]["code"] == "forbidden"


def test_an_omitted_model_is_the_base(server: Server, model: Path):
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    for path, body in (
        ("/v1/chat/completions", chat),
        ("/v1/completions", {"model": "", "prompt": "Hi", "max_tokens": 1}),
        ("/v1/embeddings", {"input": "Hi"}),
    ):
        assert read(server, path, body)["model"] == str(model)


def test_loraxs_fields_on_openais_routes_say_where_the_adapter_is(server: Server):
    chat = {"model": "first", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    extra = {"adapter_source": "local", "api_token": "secret", "ignore_eos_token": True}
    assert read(server, "/v1/chat/completions", {**chat, **extra})["usage"]["completion_tokens"] == 3
    status, _, text = call(server, "/v1/chat/completions", {**chat, "adapter_source": "s3"})
    error = json.loads(text)["error"]
    assert (status, error["param"]) == (400, "adapter_source") and "one of this server's (local, hub)" in error[
        "message"
    ]


def test_vllms_tokenize_detokenize_and_version(server: Server):
    found = read(server, "/tokenize", {"model": "first", "prompt": "ab", "return_token_strs": True})
    assert (found["count"], found["max_model_len"], found["token_strs"]) == (2, 4096, ["a", "b"])
    assert read(server, "/tokenize", {"prompt": "ab"}) == {**found, "token_strs": None}
    assert read(server, "/detokenize", {"tokens": found["tokens"]}) == {"prompt": "ab"}
    assert call(server, "/detokenize", {"tokens": [10**6]})[0] == 422
    assert read(server, "/version")["version"]


def test_vllms_tokenize_renders_conversations_like_chat_completions(server: Server):
    chat = {"model": "first", "messages": [{"role": "user", "content": [{"type": "text", "text": "ß?"}]}]}
    found = read(server, "/tokenize", {**chat, "return_token_strs": True})
    answered = read(server, "/v1/chat/completions", {**chat, "max_tokens": 1})
    assert found["count"] == answered["usage"]["prompt_tokens"] == len(found["tokens"]) == len(found["token_strs"])
    closed = {**chat, "add_generation_prompt": False}
    shorter = read(server, "/tokenize", closed)["tokens"]
    assert found["tokens"][: len(shorter)] == shorter and len(shorter) < found["count"]
    assert len(shorter) == read(server, "/v1/chat/completions", {**closed, "max_tokens": 1})["usage"]["prompt_tokens"]
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
    assert read(server, "/tokenize", {**chat, "tools": [tool]})["count"] > found["count"] + 50
    assert call(server, "/tokenize", {**chat, "model": "unknown"})[0] == 404
    begun = {**chat, "messages": [*chat["messages"], {"role": "assistant", "content": "It is"}]}
    continued = {**begun, "continue_final_message": True}
    prompt = read(server, "/detokenize", {"tokens": read(server, "/tokenize", continued)["tokens"]})["prompt"]
    assert prompt.endswith("It is")
    assert call(server, "/tokenize", {**continued, "add_generation_prompt": True})[0] == 422


def test_adapters_are_loaded_listed_and_unloaded_under_both_routes_names(server: Server):
    def tier() -> str:
        return next(adapter["tier"] for adapter in read(server, "/adapters") if adapter["id"] == "second")

    server.assert_nothing_is_held()
    call(server, "/adapters/unload", {"id": "second"})  # other tests may have loaded it
    assert tier() == "disk"
    assert read(server, "/adapters/load", {"id": "second"})["lora_rank"] == 8
    assert tier() == "host"
    assert call(server, "/v1/unload_lora_adapter", {"lora_name": "second"})[0] == 200
    assert tier() == "disk"
    assert call(server, "/v1/load_lora_adapter", {"lora_name": "second", "lora_path": "/adapters/second"})[0] == 200
    assert call(server, "/v1/load_lora_adapter", {"lora_name": "second", "lora_path": "/etc"})[0] == 400
    pinned = read(server, "/adapters/pin", {"id": "second"})
    assert pinned["pinned"] and pinned["tier"] == "device" and pinned["residences"][0]["pinned"]
    assert not read(server, "/adapters/unpin", {"digest": pinned["digest"]})["pinned"]
    assert call(server, "/adapters/unload", {"id": "second", "digest": pinned["digest"]})[0] == 422
    assert call(server, "/adapters/unload", {"id": "second", "wait": True})[0] == 200
    assert call(server, "/adapters/unload", {"digest": pinned["digest"]})[0] == 404


def test_adapters_are_loaded_pinned_and_unloaded_by_sglangs_routes(server: Server):
    name = {"lora_name": "second"}
    loaded = read(server, "/load_lora_adapter", {**name, "lora_path": "/adapters/second", "pinned": True})
    assert loaded["success"] and loaded["loaded_adapters"]["second"] == "/adapters/second"
    assert next(each["pinned"] for each in read(server, "/adapters") if each["id"] == "second")
    gone = read(server, "/unload_lora_adapter", name)
    assert gone["success"] and "second" not in gone["loaded_adapters"]
    status, _, refused = call(server, "/load_lora_adapter", {**name, "lora_path": "/etc"})
    assert status == 400 and "`lora_path` must be, or end in, 'second'" in refused
    assert json.loads(refused)["success"] is False
    assert call(server, "/unload_lora_adapter", name)[0] == 404


def test_adapters_are_listed_in_pages_if_requested(server: Server):
    everything = [adapter["id"] for adapter in read(server, "/adapters")]
    found = list[str]()
    while page := read(server, f"/adapters?limit=1&after={quote(found[-1] if found else '')}"):
        found += [adapter["id"] for adapter in page]
    assert found == everything and len(found) > 2
    assert call(server, "/adapters?limit=0")[0] == 422
    for query, said in (("after=absent", "must be a listed id"), ("limits=2", "`limits` is not a query parameter")):
        status, _, answer = call(server, f"/adapters?{query}")
        assert status == 422 and said in str(answer)


def test_the_openapi_document_has_every_route_and_the_statuses_of_its_errors(server: Server):
    paths = read(server, "/openapi.json")["paths"]
    assert read(server, "/api-doc/openapi.json")["paths"] == paths
    assert {"/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions", "/adapters"} < set(paths)
    assert {"200", "404", "422", "429"} <= set(paths["/generate"]["post"]["responses"])


def test_the_documentation_loads_nothing_from_elsewhere(server: Server):
    for page in "/docs", "/redoc":
        status, headers, body = call(server, page)
        assert status == 200 and "text/html" in headers["content-type"]
        fetched = re.findall(r'(?:src|href)="([^"]+)"', body)
        assert fetched and all(address.startswith(("/docs-assets/", "data:")) for address in fetched)
        assert all(call(server, address)[0] == 200 for address in fetched if address.startswith("/"))


def test_the_playground_loads_its_own_files_and_links_to_everything(server: Server):
    status, headers, page = call(server, "/")
    assert status == 200 and "text/html" in headers["content-type"]
    for script in re.findall(r'src="([^"]+)"', page):
        status, headers, _ = call(server, f"/{script}")
        assert status == 200 and "text/javascript" in headers["content-type"]
    for link in re.findall(r'href="([^"#]+)"', page):
        assert link == "data:," or call(server, f"/{link}")[0] == 200
    assert call(server, "/playground/routes.py")[0] == 404


def test_the_playground_has_a_strict_policy_and_nothing_inline(server: Server):
    _, headers, page = call(server, "/")
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'") and "unsafe" not in policy
    assert not re.findall(r"<style|<script(?! type=\"module\" src=\"[\w/.]+\"></script>)|\b(?:style|on\w+)=", page)
