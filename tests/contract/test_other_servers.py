"""What clients of other servers send to OpenAI's routes is honoured, refused by name, or named in a warning."""

import itertools
import json
import urllib.request
from typing import Any

import pytest

from loraplex import Client
from tests.contract.test_http import call
from tests.e2e.processes import Server
from tests.e2e.tiny import byte_tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "temperature": 0}
PROMPT = {"prompt": "Hello", "max_tokens": 6, "temperature": 0}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("read_time", "read_sky")]


def ask(server: Server, path: str, body: dict[str, Any], **headers: str) -> tuple[dict[str, Any], Any]:
    """The answer, and its headers."""
    sent = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), sent)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read()), response.headers


def chunks(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    events = call(server, path, {**body, "stream": True})[2].strip().split("\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


@pytest.mark.parametrize(
    ("field", "off", "value"),
    [
        ("priority", 0, 5),
        ("length_penalty", 1.0, 2.0),
        ("use_beam_search", False, True),
        ("thinking_token_budget", None, 5),
        ("truncation_side", "left", "right"),
        ("structural_tag", None, "{}"),
        ("modalities", ["text"], ["text", "audio"]),
        ("input_ids", None, [5]),
        ("stop_regex", None, "a+"),
        ("custom_logit_processor", None, "x"),
        ("mirostat", 0, 2),
        ("dry_multiplier", 0.0, 0.8),
        ("xtc_probability", 0, 0.5),
        ("dynatemp_range", 0, 0.5),
        ("lora", [], [{"id": 0, "scale": 1.0}]),
        ("echo", False, True),
        ("best_of", 1, 2),
        ("watermark", False, True),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name_unless_it_is_off(
    server: Server, field: str, off: object, value: object
):
    answer, headers = ask(server, CHAT, {**HELLO, field: off, "max_tokens": 1})
    assert answer["choices"] and "x-loraplex-warning" not in headers
    status, _, text = call(server, CHAT, {**HELLO, field: value})
    assert status == 400 and json.loads(text)["error"]["param"] == field


@pytest.mark.parametrize(
    ("other", "ours"),
    [
        ({"repeat_penalty": 1e-3}, {"repetition_penalty": 1e-3}),
        ({"typ_p": 0.2, "temperature": 1.5, "seed": 4}, {"typical_p": 0.2, "temperature": 1.5, "seed": 4}),
        ({"random_seed": 7, "temperature": 1.5}, {"seed": 7, "temperature": 1.5}),
        ({"n_predict": 2, "max_tokens": None}, {"max_tokens": 2}),
        ({"lora_path": "first"}, {"model": "first"}),
        ({"model": "second", "lora_path": "first"}, {"model": "second"}),
    ],
)
def test_other_names_of_fields_mean_the_same(server: Server, other: dict[str, Any], ours: dict[str, Any]):
    for path, body in ((CHAT, HELLO), (COMPLETIONS, PROMPT)):
        found = [ask(server, path, {**body, **options})[0]["choices"] for options in (other, ours)]
        assert found[0] == found[1] != ask(server, path, body)[0]["choices"]


def test_fields_that_are_not_known_are_ignored_with_a_warning(server: Server):
    for path, body in ((CHAT, HELLO), (COMPLETIONS, PROMPT)):
        for stream in (False, True):
            _, headers, _ = call(
                server, path, {**body, "samplers": ["top_k"], "é" * 99: 1, "user": "u", "stream": stream}
            )
            warning = headers["x-loraplex-warning"]
            assert "'samplers'" in warning and "\\xe9" in warning and "user" not in warning and len(warning) < 999
    _, headers, _ = call(server, CHAT, HELLO | dict.fromkeys(map(str, range(500)), 1))
    assert headers["x-loraplex-warning"].endswith("'15' and 484 more")


def test_the_callers_id_names_the_request(server: Server):
    for path, body, prefix in ((CHAT, HELLO, "chatcmpl"), (COMPLETIONS, PROMPT, "cmpl")):
        for headers, extra in (
            ({"X_Request_Id": "mine-1"}, {}),
            ({"X_Request_Id": "theirs"}, {"request_id": "mine-1"}),
        ):
            answer, said = ask(server, path, {**body, **extra}, **headers)
            assert answer["id"] == f"{prefix}-mine-1" and said["x-request-id"] == "mine-1"
        answer, said = ask(server, path, body, X_Request_Id="no id at all")
        assert answer["id"] == f"{prefix}-{said['x-request-id']}" and " " not in answer["id"]
    assert call(server, CHAT, {**HELLO, "request_id": "no id"})[0] == 400
    several, _ = ask(server, COMPLETIONS, {**PROMPT, "prompt": ["a", "b"], "request_id": "mine-1"})
    assert len(several["choices"]) == 2
    pair = {"text_1": "a", "text_2": "b"}
    for path, body in (("/v1/embeddings", {"input": ["a", "b"]}), ("/score", pair), ("/generate", {"inputs": "a"})):
        _, said = ask(server, path, body, X_Request_Id="mine-2")
        assert said["x-request-id"] == "mine-2"


def test_token_ids_are_returned_if_requested(server: Server):
    body = {**PROMPT, "return_token_ids": True}
    whole = ask(server, COMPLETIONS, body)[0]["choices"][0]
    assert whole["prompt_token_ids"] == byte_tokenizer().encode("Hello") and len(whole["token_ids"]) == 6
    first, *others = (chunk["choices"][0] for chunk in chunks(server, COMPLETIONS, body))
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert [*first["token_ids"], *itertools.chain(*(c["token_ids"] for c in others))] == whole["token_ids"]
    chat = {**HELLO, "return_token_ids": True}
    answer = ask(server, CHAT, chat)[0]
    pieces = chunks(server, CHAT, chat)
    assert pieces[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    assert not any("prompt_token_ids" in piece for piece in pieces[1:])
    ids = [token for piece in pieces for token in piece["choices"][0].get("token_ids", ())]
    assert ids == answer["choices"][0]["token_ids"] and len(ids) == 6


@pytest.mark.parametrize("choice", ["required", "read_sky"])
def test_a_forced_tool_comes_before_another_format(server: Server, choice: str):
    wanted = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}}
    body = {**HELLO, "max_tokens": 200, "tools": TOOLS, "tool_choice": choice, **wanted, "parallel_tool_calls": False}
    message = ask(server, CHAT, body)[0]["choices"][0]["message"]
    assert message["content"] is None and set(json.loads(message["tool_calls"][0]["function"]["arguments"])) == {"a"}


def test_only_allowed_tools_are_called(server: Server):
    def choice(name: str) -> dict[str, Any]:
        tools = [{"type": "function", "function": {"name": name}}]
        return {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": tools}}

    options = {**HELLO, "max_tokens": 200, "tools": TOOLS, "parallel_tool_calls": False}
    for name in ("read_time", "read_sky"):
        message = ask(server, CHAT, {**options, "tool_choice": choice(name)})[0]["choices"][0]["message"]
        assert [made["function"]["name"] for made in message["tool_calls"]] == [name]
    status, _, text = call(server, CHAT, {**options, "tool_choice": choice("absent")})
    assert status == 400 and json.loads(text)["error"]["param"] == "tool_choice"


@pytest.mark.parametrize(
    "options",
    [
        {"guided_grammar": '?start: "yes" | "no"', "structured_outputs": {"grammar": '?start: "yes" | "no"'}},
        {"response_format": {"type": "grammar", "value": 'root ::= "yes" | "no"'}},
        {"response_format": {"type": "regex", "value": "yes|no"}, "regex": "yes|no"},
    ],
    ids=str,
)
def test_one_format_may_be_given_under_several_names(server: Server, options: dict[str, Any]):
    answer = ask(server, CHAT, {**HELLO, **options})[0]
    assert answer["choices"][0]["message"]["content"] in ("yes", "no")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"regex": "a", "guided_regex": "b"}, "regex"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"jsn": SCHEMA}}, "structured_outputs[jsn]"),
        ({"response_format": {"type": "structural_tag", "format": {}}}, "response_format[type]"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0][type]"),
    ],
    ids=str,
)
def test_formats_and_tools_that_are_not_supported_are_refused_by_name(
    server: Server, options: dict[str, Any], field: str
):
    status, _, text = call(server, CHAT, {**HELLO, **options})
    assert status == 400 and json.loads(text)["error"]["param"] == field


def test_keywords_that_cannot_be_enforced_are_named_in_a_warning_unless_the_schema_is_strict(server: Server):
    schema = {**SCHEMA, "not": {"required": ["b"]}}
    for strict in (None, False, True):
        function = {"name": "read_sea", "parameters": schema, "strict": strict}
        calls = {"tools": [*TOOLS, {"type": "function", "function": function}], "tool_choice": "required"}
        answer = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema, "strict": strict}}}
        for options, field in ((calls, "tools[2].function.parameters"), (answer, "response_format")):
            status, headers, text = call(server, CHAT, {**HELLO, **options})
            if strict:
                assert status == 400 and json.loads(text)["error"]["param"] == field and "not" in text
            else:
                warning = headers["x-loraplex-warning"]
                assert status == 200 and warning.startswith(field) and warning.endswith("not enforced: not")
                assert ("'read_sea'" in warning) == ("tools" in options)


def test_what_hugging_faces_clients_call_the_model_is_the_base(server: Server):
    answers = [
        ask(server, CHAT, {**HELLO, "model": model})[0]["choices"]
        for model in (None, "", "tgi", "dummy", server.url, f"{server.url}/", f"{server.url}/v1/")
    ]
    assert all(answer == answers[0] for answer in answers)
    assert call(server, CHAT, {**HELLO, "model": f"{server.url}/first"})[0] == 404


def test_a_chats_prompt_logprobs_are_beside_its_choices(server: Server):
    answer, _ = ask(server, CHAT, {**HELLO, "n": 2, "prompt_logprobs": 1})
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"] and answer["prompt_logprobs"][0] is None
    assert not any("prompt_logprobs" in choice for choice in answer["choices"])
    status, _, text = call(server, CHAT, {**HELLO, "prompt_logprobs": 1, "stream": True})
    assert status == 400 and json.loads(text)["error"]["param"] == "prompt_logprobs"


def test_top_logprobs_have_the_token_itself_and_the_best_first(server: Server):
    body = {**PROMPT, "temperature": 2.0, "seed": 1, "max_tokens": 20, "return_tokens_as_token_ids": True}
    for count in (0, 2):
        logprobs = ask(server, COMPLETIONS, {**body, "logprobs": count})[0]["choices"][0]["logprobs"]
        for token, own, top in zip(
            *(logprobs[key] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
        ):
            assert top[token] == own and count <= len(top) <= count + 1
            assert [*top.values()] == sorted(top.values(), reverse=True)


def test_a_wrong_adapter_is_named_as_the_route_calls_it(server: Server):
    for body in ({"prompt": "a"}, {"messages": HELLO["messages"]}):
        status, _, text = call(server, "/tokenize", {**body, "model": "../x"})
        assert status == 422 and "`model`" in json.loads(text)["error"]


def test_routes_of_vllm_and_sagemaker(server: Server):
    assert call(server, "/ping", {})[0] == 200
    assert ask_get(server, "/load") == {"server_load": 0}
    info = ask_get(server, "/tokenizer_info")
    assert "messages" in info["chat_template"] and info["eos_token"] == "</s>" and info["tokenizer_class"]


def ask_get(server: Server, path: str) -> Any:
    return json.loads(call(server, path)[2])


def test_max_tokens_beyond_the_room_are_refused_in_vllms_words(server: Server):
    text = call(server, COMPLETIONS, {**PROMPT, "max_tokens": 5000})[2]
    assert "you requested 5000 output tokens and your prompt contains 5 input tokens" in text


def test_thoughts_are_beside_the_content_streamed_or_not(server: Server):
    body = {**HELLO, "model": "thinking", "max_tokens": 12}
    everything = ask(server, CHAT, {**body, "separate_reasoning": False})[0]["choices"][0]["message"]
    assert everything["content"] and "reasoning" not in everything
    message = ask(server, CHAT, body)[0]["choices"][0]["message"]  # it ends while the model thinks
    assert message["content"] is None and message["reasoning_content"] == message["reasoning"]
    assert message["reasoning"] == everything["content"].lstrip()
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(server, CHAT, body)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning"]
    assert not any(delta.get("content") for delta in deltas)
    with Client(server.address) as client:
        options = {"adapter": "thinking", "max_new_tokens": 12, "temperature": 0}
        over_grpc = client.generate(HELLO["messages"], reasoning=True, **options).sequences[0]
        assert (over_grpc.text, over_grpc.reasoning) == (
            "",
            client.generate(HELLO["messages"], **options).text.lstrip(),
        )
    hidden = ask(server, CHAT, {**body, "include_reasoning": False})[0]["choices"][0]["message"]
    assert not hidden["content"] and "reasoning" not in hidden
    formatted = ask(server, CHAT, {**body, "regex": "yes|no"})[0]["choices"][0]["message"]  # begins after them
    assert formatted["content"] is None and formatted["reasoning"]
    without = {**body, "regex": "yes|no", "chat_template_kwargs": {"enable_thinking": False}}
    formatted = ask(server, CHAT, without)[0]["choices"][0]["message"]
    assert formatted["content"] in ("yes", "no") and "reasoning" not in formatted


def test_functions_of_older_clients_are_called_and_answered(server: Server):
    functions = [{"name": "read", "parameters": {"type": "object", "properties": {"a": {"type": "boolean"}}}}]
    body = {**HELLO, "functions": functions, "function_call": {"name": "read"}, "max_tokens": 100, "seed": 1}
    (choice,) = ask(server, CHAT, body)[0]["choices"]
    assert choice["finish_reason"] == "function_call" and "tool_calls" not in choice["message"]
    call = choice["message"]["function_call"]
    assert call["name"] == "read" and json.loads(call["arguments"]).keys() <= {"a"}
    deltas = [chunk["choices"][0]["delta"].get("function_call", {}) for chunk in chunks(server, CHAT, body)]
    assert [delta["name"] for delta in deltas if "name" in delta] == ["read"]
    assert "".join(delta.get("arguments", "") for delta in deltas) == call["arguments"]
    said = [*HELLO["messages"], {"role": "assistant", "content": None, "function_call": call}]
    said += [{"role": "function", "name": "read", "content": "noon"}]
    in_todays_form = [{"id": "call_1", "type": "function", "function": call}]
    same = [*HELLO["messages"], {"role": "assistant", "content": None, "tool_calls": in_todays_form}]
    same += [{"role": "tool", "name": "read", "content": "noon", "tool_call_id": "call_1"}]
    tools = [{"type": "function", "function": function} for function in functions]
    old = ask(server, CHAT, {**body, "messages": said, "function_call": "none"})[0]
    new = ask(server, CHAT, {**HELLO, "messages": same, "tools": tools, "tool_choice": "none", "seed": 1})[0]
    assert old["usage"]["prompt_tokens"] == new["usage"]["prompt_tokens"]
    for wrong, field in (({"tools": tools}, "functions"), ({"functions": None}, "function_call")):
        assert json.loads(call_with(server, {**body, **wrong}))["error"]["param"] == field


def call_with(server: Server, body: object) -> str:
    status, _, text = call(server, CHAT, body)
    assert status == 400
    return text


def test_only_allowed_tokens_and_no_bad_words_are_generated(server: Server):
    allowed = ask(server, "/tokenize", {"prompt": "abc"})[0]["tokens"]
    body = {**PROMPT, "max_tokens": 20, "allowed_token_ids": allowed, "temperature": 2, "seed": 5}
    text = ask(server, COMPLETIONS, body)[0]["choices"][0]["text"]
    assert set(text) == set("abc") and len(text) == 20
    without = ask(server, COMPLETIONS, {**body, "bad_words": ["ab", "c"]})[0]["choices"][0]["text"]
    assert "ab" not in without and set(without) <= set("ab") and len(without) == 20
    for wrong, field in (
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"suffix": "x"}, "suffix"),
    ):
        status, _, answer = call(server, COMPLETIONS, {**PROMPT, **wrong})
        assert status == 400 and json.loads(answer)["error"]["param"] == field


def test_sagemakers_route_takes_the_bodies_of_openais(server: Server):
    for path, body in ((CHAT, HELLO), (COMPLETIONS, PROMPT)):
        assert ask(server, "/invocations", body)[0]["choices"] == ask(server, path, body)[0]["choices"]
        assert chunks(server, "/invocations", body)[-1]["choices"][0]["finish_reason"] == "length"
    assert len(ask(server, "/invocations", {"input": "Hello"})[0]["data"]) == 1
    status, _, text = call(server, "/invocations", {**HELLO, "temperature": -1})
    assert status == 400 and json.loads(text)["error"]["param"] == "temperature"
    assert call(server, "/invocations", b" " * (16 << 20))[0] == 413
