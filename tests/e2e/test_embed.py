"""Embeddings through a running server equal transformers' and PEFT's hidden states, in chunks, beside generations."""

import asyncio
import math
from pathlib import Path

import pytest
import requests
import torch
from peft import PeftModel
from torch.nn.functional import normalize
from transformers import AutoModel, AutoModelForCausalLM

from loraplex import AdapterNotFoundError, AsyncClient, Client, InvalidRequestError, MergedAdapters
from tests.e2e.processes import Server
from tests.e2e.tiny import Oracle, byte_tokenizer, save_embedding_adapter, save_embedding_model

TEXTS = ["Hello", "A longer brown text, in many chunks. " * 20, "é€😀"]
ADAPTERS = [None, "r8", "patterns", "activated1"]  # the last one by the second text alone


@pytest.fixture(scope="module")
def expected(model: Path, adapters: Path) -> dict[tuple[str | None, str], torch.Tensor]:
    vectors = {}
    for name in ADAPTERS:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        if name:
            loaded = PeftModel.from_pretrained(loaded, adapters / name)
        for text in TEXTS:
            with torch.inference_mode():
                ids = torch.tensor([byte_tokenizer().encode(text)])
                hidden = loaded(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            vectors[name, text] = normalize(hidden.mean(0), dim=0)
    return vectors


@pytest.mark.parametrize("tp", [1, 2])
async def test_embeddings_equal_pooled_hidden_states_beside_generations(
    tp: int, model: Path, adapters: Path, expected: dict[tuple[str | None, str], torch.Tensor], oracle: Oracle
) -> None:
    # 64 blocks are too few for all texts at once, and 32 tokens per step divide the long text into many chunks.
    limits = "--kv-blocks=64", "--max-batch-tokens=32", "--max-sequences=16"
    with Server(str(model), f"--adapters={adapters}", *limits, "--threads=1", f"--tp={tp}") as server:
        async with AsyncClient(server.address) as client:
            for _ in range(2):  # the second time, the texts' blocks are in the prefix cache
                generating = client.generate(TEXTS[1], adapter="r8", max_new_tokens=8, ignore_eos=True)
                answer, *found = await asyncio.gather(
                    generating, *(client.embed(TEXTS, adapter=name) for name in ADAPTERS)
                )
                tokens = oracle.generate(byte_tokenizer().encode(TEXTS[1]), "r8", 8)[0]
                assert [token.id for token in answer.sequences[0].tokens] == tokens
                for name, embeddings in zip(ADAPTERS, found, strict=True):
                    for text, embedding in zip(TEXTS, embeddings, strict=True):
                        actual = torch.tensor(embedding.values)
                        torch.testing.assert_close(actual, expected[name, text], atol=1e-4, rtol=1e-3)
                        assert embedding.prompt_tokens == len(text.encode())
                        assert bool(embedding.warnings) is (name == "activated1" and "brown" not in text)
        server.assert_nothing_is_held()


def test_inputs_are_texts_token_ids_or_conversations(server: Server) -> None:
    with Client(server.address) as client:
        (text,) = client.embed("Hi")
        ids, chat = client.embed([byte_tokenizer().encode("Hi"), [{"role": "user", "content": "Hi"}]])
        (rendered,) = client.embed(["<user>Hi<assistant>"])
    assert ids.values == pytest.approx(text.values, abs=1e-5)
    assert chat.values == pytest.approx(rendered.values, abs=1e-5)
    assert math.hypot(*text.values) == pytest.approx(1, abs=1e-5)


def test_merged_adapters_embed_too(server: Server) -> None:
    with Client(server.address) as client:
        (alone,) = client.embed("Hi", adapter="r8")
        (merged,) = client.embed("Hi", adapter=MergedAdapters(["r8"]))
        (other,) = client.embed("Hi", adapter=MergedAdapters(["r8", "attention"]))
    assert merged.values == pytest.approx(alone.values, abs=1e-4)
    assert other.values != pytest.approx(alone.values, abs=1e-2)


def test_a_text_that_fills_the_context_is_embedded_and_a_longer_one_is_refused(server: Server) -> None:
    with Client(server.address) as client:
        limit = client.info().max_model_len
        assert client.embed("x" * limit)[0].prompt_tokens == limit
        with pytest.raises(InvalidRequestError, match=f"the context has room for {limit}"):
            client.embed(["Hi", "x" * (limit + 1)])


@pytest.mark.parametrize("inputs", [[], [""], [[999_999]], ["Hi"] * 1025])
def test_inputs_that_cannot_be_embedded_are_refused(server: Server, inputs: list[object]) -> None:
    with Client(server.address) as client, pytest.raises(InvalidRequestError):
        client.embed(inputs)


def test_an_unknown_adapter_is_never_the_base_model(server: Server) -> None:
    with Client(server.address) as client, pytest.raises(AdapterNotFoundError):
        client.embed("Hi", adapter="unknown-adapter")


def test_a_model_saved_without_a_head_embeds_with_adapters_and_refuses_to_generate(tmp_path: Path) -> None:
    model = save_embedding_model(tmp_path / "model")
    save_embedding_adapter(model, tmp_path / "adapters" / "tuned")
    base = AutoModel.from_pretrained(model).eval()
    ids = torch.tensor([byte_tokenizer().encode("Hello")])
    with Server(str(model), f"--adapters={tmp_path / 'adapters'}", "--kv-blocks=64", "--threads=1") as server:
        with Client(server.address) as client:
            assert client.info().embeds_only
            found = [client.embed("Hello", adapter=name)[0].values for name in (None, "tuned")]
            with pytest.raises(InvalidRequestError, match="model: is an embedding model, saved without an lm head"):
                client.generate("Hello", max_new_tokens=1)
        for route, body in {
            "/generate": {"inputs": "Hello"},
            "/v1/completions": {"model": str(model), "prompt": "Hello"},
            "/v1/chat/completions": {"model": str(model), "messages": [{"role": "user", "content": "Hello"}]},
        }.items():
            answer = requests.post(server.url + route, json=body, timeout=60)
            assert answer.status_code in (400, 422) and "embedding model" in answer.text
        assert requests.get(f"{server.url}/startup", timeout=60).status_code == 200
    expected = []
    with torch.inference_mode():  # its files select the last token, without normalization
        expected.append(base(input_ids=ids).last_hidden_state[0, -1])
        tuned = PeftModel.from_pretrained(base, tmp_path / "adapters" / "tuned").eval()
        expected.append(tuned(input_ids=ids).last_hidden_state[0, -1])
    for values, vector in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(values), vector, atol=1e-4, rtol=1e-3)
    assert found[0] != pytest.approx(found[1], abs=1e-2)
