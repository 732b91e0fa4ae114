"""An adapter with tokens that the model does not have, as chat fine-tunes add them: its prompts and answers have them,
and nobody else's."""

import asyncio
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex import AsyncClient, Client, FinishReason, GeneratedSequence, InvalidRequestError, Regex
from tests.e2e.processes import Server
from tests.e2e.tiny import Oracle, byte_tokenizer, chatml_tokenizer, save_adapter, save_chatml_adapter

START, END = chatml_tokenizer().convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
PROMPT = "<|im_start|>user\nHello<|im_end|>\n"


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own-tokens")
    save_chatml_adapter(model, folder / "chatml")
    save_adapter(model, folder / "plain", 4, 1)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, folder: Path) -> Iterator[Server]:
    """Two ranks."""
    flags = f"--adapters={folder}", "--kv-blocks=512", "--threads=1", "--tp=2"
    with Server(str(model), *flags) as running:
        yield running
        running.assert_nothing_is_held()


def post(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    asked = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as response:
        return json.load(response)


async def test_in_one_batch_with_others_every_answer_is_pefts(server: Server, model: Path, folder: Path):
    oracle = Oracle(model, folder)
    async with AsyncClient(server.address) as client:

        async def ask(adapter: str | None) -> GeneratedSequence:
            options = {"logprobs": True, "top_logprobs": 5, "ignore_eos": True}
            (sequence,) = (await client.generate(PROMPT, adapter=adapter, max_new_tokens=24, **options)).sequences
            return sequence

        answers = await asyncio.gather(*(ask(name) for name in (None, "chatml", "plain", "chatml")))
    for name, answer in zip((None, "chatml", "plain", "chatml"), answers, strict=True):
        tokenizer = chatml_tokenizer() if name == "chatml" else byte_tokenizer()
        ids, logprobs = oracle.generate(tokenizer.encode(PROMPT), name, 24)
        assert [token.id for token in answer.tokens] == ids
        assert [token.logprob for token in answer.tokens] == pytest.approx(logprobs, abs=1e-3)
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True)
        seen = {other.id for token in answer.tokens for other in token.alternatives} | set(ids)
        assert (max(seen) >= START) == (name == "chatml")
    assert START in [token.id for token in answers[1].tokens] or END in [token.id for token in answers[1].tokens]


def test_its_conversations_have_its_template_its_tokens_and_its_end(server: Server, model: Path, folder: Path):
    messages = [{"role": "user", "content": "Hello"}]
    prompt = chatml_tokenizer().apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert post(server, "/tokenize", {"model": "chatml", "messages": messages})["tokens"] == prompt
    assert post(server, "/tokenize", {"model": "chatml", "prompt": PROMPT})["tokens"] == chatml_tokenizer().encode(
        PROMPT
    )
    ids, _ = Oracle(model, folder).generate(prompt, "chatml", 64)
    ended = ids[: ids.index(END) + 1] if END in ids else ids
    body = {"model": "chatml", "messages": messages, "max_tokens": 64, "temperature": 0, "logprobs": True}
    (choice,) = post(server, "/v1/chat/completions", body)["choices"]
    assert choice["finish_reason"] == ("stop" if END in ids else "length")
    assert choice["message"]["content"] == chatml_tokenizer().decode(ended, skip_special_tokens=True)


def test_ids_of_its_tokens_are_its_alone(server: Server):
    with Client(server.address) as client:
        answer = client.generate("Hi", adapter="chatml", max_new_tokens=3, logit_bias={START: 100.0}, ignore_eos=True)
        assert [token.id for token in answer.sequences[0].tokens] == [START] * 3
        stopped = client.generate("Hi", adapter="chatml", max_new_tokens=3, logit_bias={START: 100.0},
                                  stop_token_ids=[START])  # fmt: skip
        assert stopped.sequences[0].finish_reason is FinishReason.END_TOKEN
        for options in {"logit_bias": {START: 1.0}}, {"stop_token_ids": [START]}:
            with pytest.raises(InvalidRequestError, match="every id must be below 257"):
                client.generate("Hi", adapter="plain", **options)
            with pytest.raises(InvalidRequestError, match="every id must be below 257"):
                client.generate("Hi", **options)
        with pytest.raises(InvalidRequestError, match="every id must be below 259"):
            client.generate("Hi", adapter="chatml", logit_bias={max(START, END) + 1: 1.0})
        by_ids = client.generate([START, 40], adapter="chatml", max_new_tokens=2, ignore_eos=True)
        by_text = client.generate("<|im_start|>" + byte_tokenizer().decode([40]), adapter="chatml", max_new_tokens=2,
                                  ignore_eos=True)  # fmt: skip
        assert [t.id for t in by_ids.sequences[0].tokens] == [t.id for t in by_text.sequences[0].tokens]


async def test_grammars_hold_beside_rows_without_its_tokens(server: Server):
    async with AsyncClient(server.address) as client:
        grammar = Regex("[a-c]{3,9}!")
        answers = await asyncio.gather(
            *(client.generate(PROMPT, adapter=name, grammar=grammar, max_new_tokens=32, temperature=1.0, seed=seed)
              for seed, name in enumerate(["chatml", None, "plain", "chatml"]))
        )  # fmt: skip
    for answer in answers:
        assert re.fullmatch("[a-c]{3,9}!", answer.sequences[0].text)


def test_it_is_the_same_after_it_was_unloaded(server: Server):
    def ask() -> list[int]:
        with Client(server.address) as client:
            answer = client.generate(PROMPT, adapter="chatml", max_new_tokens=8, ignore_eos=True)
            return [token.id for token in answer.sequences[0].tokens]

    first = ask()
    with Client(server.address) as client:
        client.unload_adapter("chatml")
    assert ask() == first
