"""Special values: null, 0, -1 and the like mean the same as in OpenAI's API, vLLM and LoRAX, or are refused by
field."""

import json
from typing import Any

import pytest

from tests.contract.test_http import call, read
from tests.e2e.processes import Server
from tests.e2e.tiny import byte_tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 6, "temperature": 0},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 6, "temperature": 0},
    "/generate": {"max_new_tokens": 6, "details": True},
}
OPENAI = ("/v1/completions", "/v1/chat/completions")


def ask(server: Server, path: str, **fields: object) -> tuple[int, Any]:
    body = {**BODIES[path], **fields}
    status, _, text = call(server, path, {"inputs": "Hi", "parameters": body} if path == "/generate" else body)
    return status, json.loads(text)


def said(answer: Any) -> Any:
    """The answer without the fields that change each time."""
    if "choices" in answer:
        return answer["choices"], answer["usage"]["completion_tokens"]
    return {**answer, "details": {**answer["details"], "skipped_tokens": 0}}


ABSENT: dict[str, tuple[object, ...]] = {
    "top_k": (None, 0, -1),
    "top_p": (None, 1, 0),
    "min_p": (None, 0),
    "top_n_sigma": (None, 0, -1),
    "typical_p": (None, 1),
    "seed": (None, -1, 0, 2**63, 2**70, -(2**63)),  # decoding is greedy, so a seed changes nothing
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "n": (None, 1),
    "stop": (None, []),
    "stop_token_ids": (None, []),
    "min_tokens": (None, 0),
    "ignore_eos": (None, False),
    "logprobs": (None, False),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None, -1, 1000),
    "stream": (None, False),
    "stream_options": (None,),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None, {}),
    "guided_json": (None,),
    "json_schema": (None, {}),
    "grammar": (None, ""),
    "skip_special_tokens": (None, True),
    "bad_words": (None, []),
    "user": (None, "somebody"),
    "adapter_source": (None, ""),
    "add_special_tokens": (None,),
}
ABSENT_OF_ONE = {
    "/v1/completions": {
        "best_of": (None, 1),
        "echo": (None, False),
        "suffix": (None, ""),
        "add_special_tokens": (True,),
    },
    "/v1/chat/completions": {
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "parallel_tool_calls": (None, True, False),
        "top_logprobs": (None, 0),
        "max_completion_tokens": (None,),
        "functions": (None, []),
        "chat_template_kwargs": (None, {}),
    },
    "/generate": {
        "adapter_id": (None, ""),
        "adapter_source": (None, ""),
        "best_of": (None, 1),
        "truncate": (None, 1000),
        "return_full_text": (None, False),
        "decoder_input_details": (None, False),
        "top_k": (None,),
        "top_p": (None,),
        "typical_p": (None,),
        "temperature": (None, 0),
        "repetition_penalty": (None, 1),
        "frequency_penalty": (None, 0),
        "min_p": (None,),
        "logit_bias": (None, {}),
        "stop": (None, []),
        "top_n_tokens": (None, 0),
        "return_k_alternatives": (None,),
        "do_sample": (None, False),
        "watermark": (None, False),
        "response_format": (None, {"type": "text"}),
        "grammar": (None,),
    },
}
AS_ABSENT = [
    *((path, field, value) for path in OPENAI for field, values in ABSENT.items() for value in values),
    *((path, field, value) for path, of in ABSENT_OF_ONE.items() for field, values in of.items() for value in values),
]


def test_values_that_are_treated_as_absent(server: Server):
    plain = {path: said(ask(server, path)[1]) for path in BODIES}
    for path, field, value in AS_ABSENT:
        status, answer = ask(server, path, **{field: value})
        assert (status, status == 200 and said(answer)) == (200, plain[path]), (path, field, value, answer)


REFUSED: dict[str, tuple[object, ...]] = {
    "top_k": (-2,),
    "top_p": (-0.1, 1.1),
    "min_p": (-1, 2),
    "temperature": (-1,),
    "repetition_penalty": (0, -1),
    "frequency_penalty": (3,),
    "max_tokens": (0, -2),
    "min_tokens": (-1,),
    "n": (0, -1, 65),
    "stop": ("", [""]),
    "truncate_prompt_tokens": (0, -2),
    "prompt_logprobs": (-1,),
    "response_format": ({"type": "json_schema"},),
}
REFUSED_OF_ONE: dict[str, dict[str, tuple[object, ...]]] = {
    "/v1/completions": {"logprobs": (-1,), "best_of": (0,)},
    "/v1/chat/completions": {"logprobs": (5,), "top_logprobs": (5, -1), "max_completion_tokens": (0, -2)},
    "/generate": {
        "max_new_tokens": (0, -1),
        "truncate": (0, -1),
        "best_of": (0,),
        "top_k": (0, -1),
        "top_p": (0,),
        "typical_p": (0,),
        "temperature": (-1,),
        "repetition_penalty": (0,),
        "min_p": (-1, 2),
        "top_n_sigma": (0, -1),
        "logit_bias": ({"999999": 1}, {"1": 101}),
        "seed": (-1, 2**64),
        "stop": ("", [""]),
        "return_k_alternatives": (0,),
        "response_format": ({"type": "json_schema"}, {"type": "regex", "value": {}}),
        "grammar": ({"type": "json"},),
    },
}
AS_REFUSED = [
    *((path, field, value) for path in OPENAI for field, values in REFUSED.items() for value in values),
    *((path, field, value) for path, of in REFUSED_OF_ONE.items() for field, values in of.items() for value in values),
]


def test_meaningless_values_are_refused_by_field(server: Server):
    for path, field, value in AS_REFUSED:
        status, answer = ask(server, path, **{field: value})
        if path == "/generate":
            assert status == 422 and field in answer["error"], (path, field, value, answer)
        else:
            assert (status, answer["error"].get("param")) == (400, field), (path, field, value, answer)


def test_a_model_that_is_null_is_the_base(server: Server):
    for path in OPENAI:
        assert ask(server, path, model=None)[1]["model"] == ask(server, path)[1]["model"]
    assert read(server, "/v1/embeddings", {"model": None, "input": "Hi"})["data"]


def test_a_prompt_is_truncated_to_the_context(server: Server):
    long = {
        "/v1/completions": {"prompt": "x" * 9000},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x" * 9000}]},
    }
    for path, fields in long.items():
        for given, prompt_tokens in ((-1, 4096 - 6), (7, 7)):
            status, answer = ask(server, path, **fields, truncate_prompt_tokens=given)
            assert (status, answer["usage"]["prompt_tokens"]) == (200, prompt_tokens)
    embedded = {"input": ["x" * 9000, "y"], "truncate_prompt_tokens": -1}
    assert read(server, "/v1/embeddings", embedded)["usage"]["prompt_tokens"] == 4096 + 1


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_minus_one_means_as_many_tokens_as_fit(server: Server, field: str):
    path = "/v1/completions" if field == "max_tokens" else "/v1/chat/completions"
    (q,) = byte_tokenizer().encode("q")
    answer = ask(
        server, path, **{field: -1, "logit_bias": {str(q): 100}, "truncate_prompt_tokens": 2, "stop": "q" * 40}
    )[1]
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", 40)
