"""One request, several adapters: each answers as it would alone, in one stream; activated ones share one prefill."""

import json
import urllib.request
from typing import Any

import pytest

from loraplex import AdapterNotFoundError, Client
from tests.e2e.conftest import INVOCATION
from tests.e2e.processes import Server
from tests.e2e.tiny import Oracle, byte_tokenizer

NAMES = [None, "activated1", "r8", "activated2", "dora", "activated3"]


def text_of(oracle: Oracle, prompt: str, adapter: str | None, tokens: int) -> str:
    ids, _ = oracle.generate(byte_tokenizer().encode(prompt), adapter, tokens)
    return byte_tokenizer().decode(ids)


def test_a_stream_has_all_answers_and_each_piece_names_its_adapter(server: Server, oracle: Oracle):
    prompt = f"The quick {INVOCATION} fox"
    with Client(server.address) as client:
        whole = client.generate(prompt, adapters=NAMES, n=2, max_new_tokens=6, ignore_eos=True)
        texts: dict[int, str] = {}
        for piece in client.stream(prompt, adapters=NAMES, max_new_tokens=6, ignore_eos=True):
            texts[piece.index] = texts.get(piece.index, "") + piece.text
            assert piece.adapter == (NAMES[piece.index] or "")
    expected = [text_of(oracle, prompt, name, 6) for name in NAMES]
    assert [texts[index] for index in range(len(NAMES))] == expected
    assert [sequence.text for sequence in whole.sequences] == [text for text in expected for _ in range(2)]
    assert [sequence.adapter for sequence in whole.sequences[::2]] == [name or "" for name in NAMES]
    digests = [sequence.adapter_digest for sequence in whole.sequences[::2]]
    assert digests[0] == "" and len(set(digests)) == len(NAMES)
    server.assert_nothing_is_held()


def test_activated_adapters_and_the_base_compute_the_document_once(server: Server):
    document = "Computed once. " * 250
    names = [None, "activated1", "activated2", "activated3", "activated4", "activated5"]
    with Client(server.address) as client:
        answer = client.generate(f"{document}{INVOCATION}", adapters=names, max_new_tokens=1)
    cached = [sequence.usage.cached_tokens for sequence in answer.sequences]
    assert cached[0] == 0 and min(cached[1:]) > len(document) - 16


def test_a_missing_adapter_is_named_and_none_answers(server: Server):
    before = server.metric("loraplex_generated_tokens_total")
    with Client(server.address) as client, pytest.raises(AdapterNotFoundError, match="'missing'"):
        client.generate("Hi", adapters=["r8", "missing"])
    assert server.metric("loraplex_generated_tokens_total") == before


def ask(server: Server, path: str, body: dict[str, Any]) -> str:
    asked = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as response:
        return response.read().decode()


def test_choices_on_openais_routes_name_their_adapter(server: Server, oracle: Oracle):
    base = json.loads(ask(server, "/v1/completions", {"prompt": "Hi", "max_tokens": 1}))["model"]
    body = {"adapters": ["r8", base, "r4"], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    given = json.loads(ask(server, "/v1/completions", {**body, "prompt": ["Hi", "Ho"]}))
    assert [choice["adapter"] for choice in given["choices"]] == ["r8", None, "r4"] * 2
    texts = [text_of(oracle, prompt, name, 4) for prompt in ("Hi", "Ho") for name in ("r8", None, "r4")]
    assert [choice["text"] for choice in given["choices"]] == texts
    assert [choice["index"] for choice in given["choices"]] == list(range(6))
    chat = {**body, "messages": [{"role": "user", "content": "Hi"}]}
    whole = json.loads(ask(server, "/v1/chat/completions", chat))["choices"]
    streamed: dict[int, str] = {}
    for line in ask(server, "/v1/chat/completions", {**chat, "stream": True}).split("\n"):
        if line.startswith("data: {"):
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            assert choice["adapter"] == ("r8", None, "r4")[choice["index"]]
            streamed[choice["index"]] = streamed.get(choice["index"], "") + (choice["delta"].get("content") or "")
    assert [choice["message"]["content"] for choice in whole] == [streamed[index] for index in range(3)]
    assert [choice["adapter"] for choice in whole] == ["r8", None, "r4"]
