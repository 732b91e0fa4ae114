"""Classification through a running server equals transformers' and PEFT's, over gRPC and in LoRAX's and vLLM's form."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, pipeline

from loraplex import AsyncClient, Client, InvalidRequestError
from tests.e2e.processes import Server
from tests.e2e.tiny import Oracle, byte_tokenizer, save_adapter, save_classifier, save_classifying_adapter

TEXTS = ["Hello", "A longer text, in many chunks. " * 20, "é€😀 </s>", "padded</s></s>"]
SENTIMENT = "negative", "neutral", "positive"
ENTITIES = "O", "B-PER", "I-PER", "B-LOC", "I-LOC"


def post(server: Server, route: str, **body: Any) -> Any:
    answer = requests.post(server.url + route, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(server: Server, route: str, **body: Any) -> str:
    answer = requests.post(server.url + route, json=body, timeout=60)
    assert answer.status_code in (400, 422), answer.text
    return answer.text


@torch.inference_mode()
def logits(model: torch.nn.Module, text: str) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.tensor([byte_tokenizer().encode(text)])).logits[0]
    return found


@pytest.fixture(scope="module")
def classifying(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters for a causal model."""
    folder = tmp_path_factory.mktemp("classifying")
    save_classifying_adapter(model, folder / "sentiment", SENTIMENT)
    save_classifying_adapter(model, folder / "entities", ENTITIES, of_tokens=True)
    save_adapter(model, folder / "plain", 4, 1)
    return folder


@pytest.fixture(scope="module")
def causal(model: Path, classifying: Path) -> Iterator[Server]:
    with Server(str(model), f"--adapters={classifying}", "--kv-blocks=256", "--threads=1") as running:
        yield running
        running.assert_nothing_is_held()


@pytest.fixture(scope="module")
def sentiment(model: Path, classifying: Path) -> PeftModel:
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
    return PeftModel.from_pretrained(base, classifying / "sentiment").eval()


@pytest.fixture(scope="module")
def entities(model: Path, classifying: Path) -> PeftModel:
    base = AutoModelForTokenClassification.from_pretrained(
        model, id2label=dict(enumerate(ENTITIES)), label2id={label: index for index, label in enumerate(ENTITIES)}
    )
    return PeftModel.from_pretrained(base, classifying / "entities").eval()


async def test_adapters_classify_as_in_peft_beside_generations_on_two_ranks(
    model: Path, classifying: Path, sentiment: PeftModel, entities: PeftModel
) -> None:
    limits = "--kv-blocks=64", "--max-batch-tokens=32", "--max-sequences=16"
    with Server(str(model), f"--adapters={classifying}", *limits, "--threads=1", "--tp=2") as server:
        async with AsyncClient(server.address) as client:
            generated, whole, tokens, embedded = await asyncio.gather(
                client.generate(TEXTS[1], adapter="plain", max_new_tokens=8, ignore_eos=True),
                client.classify(TEXTS, adapter="sentiment"),
                client.classify(TEXTS, adapter="entities"),
                client.embed(TEXTS, adapter="sentiment"),
            )
        server.assert_nothing_is_held()
    expected = Oracle(model, classifying).generate(byte_tokenizer().encode(TEXTS[1]), "plain", 8)[0]
    assert [token.id for token in generated.sequences[0].tokens] == expected and len(embedded) == len(TEXTS)
    for text, found in zip(TEXTS, whole, strict=True):
        scores = logits(sentiment, text).softmax(-1)
        assert tuple(found.scores) == SENTIMENT and found.label == SENTIMENT[int(scores.argmax())]
        torch.testing.assert_close(torch.tensor([*found.scores.values()]), scores, atol=1e-4, rtol=1e-3)
    for text, found in zip(TEXTS, tokens, strict=True):
        scores = logits(entities, text).softmax(-1)
        assert all(token.text == text[token.start : token.stop] for token in found.tokens)
        ours = torch.tensor([[*token.scores.values()] for token in found.tokens])
        torch.testing.assert_close(ours, scores, atol=1e-4, rtol=1e-3)
        assert [token.label for token in found.tokens] == [ENTITIES[place] for place in scores.argmax(-1).tolist()]


def test_loraxs_entities_equal_transformers_pipelines(causal: Server, entities: PeftModel) -> None:
    oracle = pipeline(
        "token-classification",
        model=entities.merge_and_unload(),
        tokenizer=byte_tokenizer(),
        aggregation_strategy="simple",
    )
    texts = ["John Smith lives in Paris, as does Jane.", "Nobody"]
    batch = post(causal, "/classify_batch", inputs=texts, parameters={"adapter_id": "entities"})
    alone = post(causal, "/classify", inputs=texts[0], parameters={"adapter_id": "entities"})
    assert alone == batch[0] and batch[0]
    for text, ours in zip(texts, batch, strict=True):
        theirs = oracle(text)
        assert [(e["entity_group"], e["start"], e["end"]) for e in ours] == [
            (e["entity_group"], e["start"], e["end"]) for e in theirs
        ]
        assert [e["score"] for e in ours] == pytest.approx([float(e["score"]) for e in theirs], abs=1e-4)
        assert all(e["word"] == text[e["start"] : e["end"]] for e in ours)


def test_whole_texts_are_answered_in_loraxs_and_in_vllms_form(causal: Server, sentiment: PeftModel) -> None:
    scores = logits(sentiment, "Hello").softmax(-1).tolist()
    ranked = post(causal, "/classify", inputs="Hello", parameters={"adapter_id": "sentiment"})
    by_score = sorted(SENTIMENT, key=lambda label: scores[SENTIMENT.index(label)], reverse=True)
    assert [each["label"] for each in ranked] == by_score
    found = post(causal, "/classify", model="sentiment", input=["Hello"])
    assert (found["object"], found["model"], found["usage"]["prompt_tokens"]) == ("list", "sentiment", 5)
    (data,) = found["data"]
    assert data["label"] == SENTIMENT[scores.index(max(scores))] and (data["index"], data["num_classes"]) == (0, 3)
    assert data["probs"] == pytest.approx(scores, abs=1e-4)
    for name in ("use_activation", "activation", "softmax"):
        raw = post(causal, "/classify", model="sentiment", input="Hello", **{name: False})["data"][0]["probs"]
        assert raw == pytest.approx(logits(sentiment, "Hello").tolist(), abs=1e-3)
    said = [{"role": "user", "content": "Hello"}]
    chat, text = (
        post(causal, "/classify", model="sentiment", **body)["data"][0]["probs"]
        for body in ({"messages": said}, {"input": "<user>Hello"})
    )
    assert chat == pytest.approx(text, abs=1e-5)


def test_requests_that_a_model_or_an_adapter_cannot_answer_are_refused_by_name(causal: Server) -> None:
    assert "has no classifier: name an adapter" in refusal(causal, "/classify", inputs="Hello")
    assert "has no classifier, nor has the adapter" in refusal(causal, "/classify", input="Hello", model="plain")
    assert "classifies tokens: send LoRAX's `inputs`" in refusal(causal, "/classify", input="Hello", model="entities")
    assert "was trained to classify" in refusal(
        causal, "/generate", inputs="Hello", parameters={"adapter_id": "sentiment"}
    )
    assert "was trained to classify" in refusal(causal, "/v1/completions", model="entities", prompt="Hello")
    assert refusal(causal, "/classify", text="Hello")
    with Client(causal.address) as client:
        with pytest.raises(InvalidRequestError, match=r"adapter\.id: was trained to classify"):
            client.generate("Hello", adapter="sentiment")
        with pytest.raises(InvalidRequestError, match="model: has no classifier"):
            client.classify("Hello")
        assert client.generate("Hello", max_new_tokens=1).text
        listed = {adapter.id: adapter.classifier for adapter in client.adapters()}
        assert listed["plain"] is None and listed["sentiment"] is not None
        assert listed["sentiment"].labels == SENTIMENT and client.info().classifier is None


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/classify", {"model": "sentiment", "input": "Hello"}),
        ("/classify", {"inputs": "Hello", "parameters": {"adapter_id": "sentiment"}}),
        ("/classify_batch", {"inputs": ["Hello"], "parameters": {"adapter_id": "sentiment"}}),
    ],
)
def test_a_misspelt_field_is_named_in_a_warning(causal: Server, route: str, body: dict[str, Any]) -> None:
    answer = requests.post(causal.url + route, json={**body, "use_activations": False}, timeout=60)
    assert answer.ok and answer.headers["X-Loraplex-Warning"].endswith("'use_activations'")


def test_the_adapter_among_several_that_cannot_generate_is_named(causal: Server) -> None:
    error = refusal(causal, "/v1/completions", adapters=["plain", "sentiment"], prompt="Hello")
    assert "`adapters[1]` names 'sentiment', which was trained to classify: it cannot generate" in error


@pytest.mark.parametrize(
    ("config", "scored"),
    [
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"num_labels": 1, "problem_type": "regression"}, lambda found: found),
    ],
    ids=["any of several", "regression"],
)
def test_a_classification_model_classifies_and_refuses_to_generate(config: Any, scored: Any, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "model", **config)
    oracle = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with Server(str(folder), "--kv-blocks=64", "--threads=1") as server, Client(server.address) as client:
        found = client.classify([*TEXTS, byte_tokenizer().encode("Hello")])
        for text, ours in zip([*TEXTS, "Hello"], found, strict=True):
            scores = torch.tensor([*ours.scores.values()])
            torch.testing.assert_close(scores, scored(logits(oracle, text)), atol=1e-4, rtol=1e-3)
        (raw,) = client.classify("Hello", raw_logits=True)
        torch.testing.assert_close(torch.tensor([*raw.scores.values()]), logits(oracle, "Hello"), atol=1e-3, rtol=1e-3)
        info = client.info()
        assert info.embeds_only and info.classifier is not None and not info.classifier.of_tokens
        assert info.architecture == "LlamaForCausalLM"
        assert client.embed("Hello")[0].values
        with pytest.raises(InvalidRequestError, match="model: is a classification model, which has no lm head"):
            client.generate("Hello", max_new_tokens=1)
        assert "is a classification model" in refusal(server, "/v1/completions", model=str(folder), prompt="Hello")
        assert requests.get(f"{server.url}/info", timeout=60).json()["model_pipeline_tag"] == "text-classification"
        assert requests.get(f"{server.url}/startup", timeout=60).status_code == 200
