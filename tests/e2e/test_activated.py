"""Activated adapters (aLoRA): answers equal PEFT's, and the base model computes the text before the invocation once for
all of them."""

import asyncio
import json
import shutil
import urllib.request
from pathlib import Path

import pytest

from loraplex import AsyncClient, Client, Generation, InvalidRequestError, MergedAdapters
from tests.e2e.conftest import ACTIVATED, INVOCATION
from tests.e2e.processes import Server
from tests.e2e.tiny import Oracle, byte_tokenizer
from tests.shard.lora_models import edit_config

DOCUMENT = "".join(f"{number}: what {number % 7} brown foxes do. " for number in range(160))[:4000]
BLOCK = 16


def assert_greedy(answer: Generation, prompt: str, adapter: str | None, oracle: Oracle) -> None:
    tokens, _ = oracle.generate(byte_tokenizer().encode(prompt), adapter, len(answer.sequences[0].tokens))
    assert [token.id for token in answer.sequences[0].tokens] == tokens, adapter


@pytest.mark.parametrize("tp", [1, 2])
def test_a_document_is_computed_once_by_the_base_and_five_activated_adapters(
    tp: int, model: Path, adapters: Path, oracle: Oracle
):
    flags = f"--adapters={adapters}", "--kv-blocks=512", "--max-adapters-on-device=2", "--threads=1", f"--tp={tp}"
    with Server(str(model), *flags) as server, Client(server.address) as client:
        first = client.generate(DOCUMENT, max_new_tokens=4, ignore_eos=True)
        assert_greedy(first, DOCUMENT, None, oracle)
        question = DOCUMENT + first.text + f"<{INVOCATION}>"
        boundary = len(byte_tokenizer().encode(question)) - len(INVOCATION) - 1
        for name in ACTIVATED:
            answer = client.generate(question, adapter=name, max_new_tokens=4, ignore_eos=True)
            assert_greedy(answer, question, name, oracle)
            cached = answer.sequences[0].usage.cached_tokens
            assert boundary - BLOCK - len(first.sequences[0].tokens) < cached <= boundary and not answer.warnings
        computed = server.metric('loraplex_step_tokens_total{phase="prefill"}')
        assert computed < len(DOCUMENT) + len(ACTIVATED) * 40
        server.assert_nothing_is_held()


async def test_activated_adapters_compute_a_document_once_even_if_all_arrive_at_the_same_time(
    server: Server, oracle: Oracle
):
    question = f"At once. {DOCUMENT}{INVOCATION}!"
    before = server.metric('loraplex_step_tokens_total{phase="prefill"}')
    async with AsyncClient(server.address) as client:
        names = [None, *ACTIVATED]
        asked = (client.generate(question, adapter=name, max_new_tokens=3, ignore_eos=True) for name in names)
        answers = await asyncio.gather(*asked)
    for name, answer in zip(names, answers, strict=True):
        assert_greedy(answer, question, name, oracle)
    assert server.metric('loraplex_step_tokens_total{phase="prefill"}') - before < len(question) + len(names) * 40


def test_prompt_logprobs_are_the_bases_before_the_invocation_and_the_adapters_after_it(server: Server, oracle: Oracle):
    prompt = f"The quick {INVOCATION} fox, the {INVOCATION} one."
    with Client(server.address) as client:
        answer = client.generate(prompt, adapter="activated2", max_new_tokens=1, prompt_logprobs=True)
    expected = oracle.prompt_logprobs(byte_tokenizer().encode(prompt), "activated2")
    assert [token.logprob for token in answer.prompt[1:]] == pytest.approx(expected, abs=2e-3)


def test_a_prompt_without_the_invocation_is_answered_by_the_base_model_with_a_warning(server: Server, oracle: Oracle):
    with Client(server.address) as client:
        answer = client.generate("A fox", adapter="activated1", max_new_tokens=4, ignore_eos=True)
        first, *_ = client.stream("A fox", adapter="activated1", max_new_tokens=4)
    assert_greedy(answer, "A fox", None, oracle)
    warning = "the prompt does not contain 'brown', which activates 'activated1': the base model answers alone"
    assert answer.warnings == first.warnings == (warning,)
    for path, body in {
        "/v1/completions": {"model": "activated1", "prompt": "A fox", "max_tokens": 2},
        "/v1/chat/completions": {"model": "activated1", "messages": [{"role": "user", "content": "Hi"}]},
        "/v1/embeddings": {"model": "activated1", "input": "A fox"},
        "/embed": {"inputs": "A fox", "parameters": {"adapter_id": "activated1"}},
        "/score": {"model": "activated1", "text_1": "A fox", "text_2": "A dog"},
        "/generate_stream": {"inputs": "A fox", "parameters": {"adapter_id": "activated1"}},
    }.items():
        data = json.dumps(body).encode()
        asked = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as response:
            assert response.headers["X-Loraplex-Warning"] == warning


def test_an_adapter_of_the_library_before_peft_acts_from_the_second_token_of_its_invocation_on(
    server: Server, model: Path, adapters: Path, oracle: Oracle, tmp_path: Path
):
    edit_config(
        shutil.copytree(adapters / "activated1", tmp_path / "same"),
        alora_invocation_tokens=byte_tokenizer().encode(INVOCATION[1:]),
    )
    prompt = f"The quick {INVOCATION} fox"
    with Client(server.address) as client:
        answer, younger = (
            client.generate(prompt, adapter=name, max_new_tokens=8, ignore_eos=True) for name in ("older", "activated1")
        )
    assert_greedy(answer, prompt, "same", Oracle(model, tmp_path))
    assert answer.text != younger.text


def test_a_conversation_can_end_with_an_invocation_that_is_a_role(server: Server, oracle: Oracle):
    messages = [{"role": "user", "content": "Hi"}, {"role": INVOCATION, "content": ""}]
    body = {"model": "activated3", "messages": messages, "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    data = json.dumps({**body, "add_generation_prompt": False, "continue_final_message": True}).encode()
    asked = urllib.request.Request(f"{server.url}/v1/chat/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as response:
        assert "X-Loraplex-Warning" not in response.headers
        text = json.load(response)["choices"][0]["message"]["content"]
    tokens, _ = oracle.generate(byte_tokenizer().encode(f"<user>Hi<{INVOCATION}>"), "activated3", 3)
    assert text == byte_tokenizer().decode(tokens)


def test_the_listings_say_what_activates_an_adapter(server: Server):
    with Client(server.address) as client:
        listed = {adapter.id: adapter for adapter in client.adapters()}
    found = listed["activated5"]
    assert (found.invocation, list(found.invocation_token_ids)) == ("brown", byte_tokenizer().encode("brown"))
    assert (listed["r8"].invocation, listed["r8"].invocation_token_ids) == ("", ())
    with urllib.request.urlopen(f"{server.url}/v1/models/activated5", timeout=60) as response:
        assert json.load(response)["invocation"] == "brown"


def test_activated_adapters_are_not_merged(server: Server):
    with (
        Client(server.address) as client,
        pytest.raises(InvalidRequestError, match="'activated1' is an activated adapter"),
    ):
        client.generate("The brown fox", adapter=MergedAdapters(["activated1", "r8"]))
