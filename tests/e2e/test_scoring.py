"""/score and /rerank of a running server: a cross-encoder's scores by transformers, or the cosine of embeddings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loraplex import Client
from tests.e2e.processes import Server
from tests.e2e.tiny import save_classifier, save_classifying_adapter

QUERY = "Which river?"
DOCUMENTS = ["The Rhine.", "A mountain, not a river. " * 10, "é€😀"]
TEMPLATE = (
    "<judge>{{ (messages | selectattr('role', 'eq', 'query') | first).content }}|"
    "{{ (messages | selectattr('role', 'eq', 'document') | first).content }}"
)


def post(server: Server, route: str, status: int = 200, **body: Any) -> Any:
    answer = requests.post(server.url + route, json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one label, whose tokenizer puts an end token behind each text of a pair."""
    folder = save_classifier(tmp_path_factory.mktemp("reranker"), num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(reranker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    adapters = tmp_path_factory.mktemp("judges")
    save_classifying_adapter(reranker, adapters / "judge", ["relevant"])
    (adapters / "judge/chat_template.jinja").write_text(TEMPLATE)
    save_classifying_adapter(reranker, adapters / "moods", ["bad", "good"])
    with Server(str(reranker), f"--adapters={adapters}", "--kv-blocks=128", "--threads=1") as running:
        yield running
        running.assert_nothing_is_held()


@pytest.fixture(scope="module")
def logits(reranker: Path) -> list[float]:
    """transformers', of the query with each document."""
    tokenizer = AutoTokenizer.from_pretrained(reranker)
    model = AutoModelForSequenceClassification.from_pretrained(reranker).eval()
    with torch.inference_mode():
        pairs = (tokenizer(QUERY, document, return_tensors="pt") for document in DOCUMENTS)
        return [float(model(input_ids=pair["input_ids"]).logits) for pair in pairs]


@pytest.mark.parametrize("route", ["/score", "/v1/score"])
def test_pairs_have_the_cross_encoders_scores(route: str, server: Server, reranker: Path, logits: list[float]) -> None:
    expected = torch.tensor(logits).sigmoid().tolist()
    found = post(server, route, model=str(reranker), queries=QUERY, documents=DOCUMENTS)
    assert [each["score"] for each in found["data"]] == pytest.approx(expected, abs=1e-4)
    assert [each["index"] for each in found["data"]] == [0, 1, 2]
    assert {each["object"] for each in found["data"]} == {"score"} and found["object"] == "list"
    tokenizer = AutoTokenizer.from_pretrained(reranker)
    tokens = sum(len(tokenizer(QUERY, document)["input_ids"]) for document in DOCUMENTS)
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] == tokens
    raw = post(server, route, text_1=[QUERY], text_2=DOCUMENTS[0], use_activation=False)
    assert raw["data"][0]["score"] == pytest.approx(logits[0], abs=1e-3)
    paired = post(server, route, data_1=[QUERY, QUERY], data_2=[{"text": text} for text in DOCUMENTS[:2]])
    assert [each["score"] for each in paired["data"]] == pytest.approx(expected[:2], abs=1e-4)


@pytest.mark.parametrize("route", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_come_back_with_the_best_first(route: str, server: Server, logits: list[float]) -> None:
    expected = torch.tensor(logits).sigmoid().tolist()
    order = sorted(range(3), key=lambda index: expected[index], reverse=True)
    found = post(server, route, query=QUERY, documents=DOCUMENTS, top_n=None)
    assert [each["index"] for each in found["results"]] == order
    for each in found["results"]:
        assert each["relevance_score"] == pytest.approx(expected[each["index"]], abs=1e-4)
        assert each["document"] == {"text": DOCUMENTS[each["index"]], "multi_modal": None}
    few = post(server, route, query=QUERY, documents=DOCUMENTS, top_n=2, return_documents=False)["results"]
    assert [each["index"] for each in few] == order[:2] and not any("document" in each for each in few)


def test_an_adapter_judges_with_its_own_classifier_and_its_own_template(server: Server) -> None:
    found = post(server, "/score", model="judge", queries=QUERY, documents=DOCUMENTS[0])
    text = f"<judge>{QUERY}|{DOCUMENTS[0]}"
    classified = post(server, "/classify", model="judge", input=text)
    assert found["data"][0]["score"] == pytest.approx(classified["data"][0]["probs"][0], abs=1e-5)
    assert found["model"] == "judge"


def test_texts_that_are_too_long_are_cut_if_asked(server: Server, reranker: Path) -> None:
    whole = post(server, "/score", queries=QUERY, documents=DOCUMENTS[1][:20])["data"]
    limited = post(server, "/score", queries=QUERY, documents=DOCUMENTS[1], max_tokens_per_doc=20)["data"]
    assert limited[0]["score"] == pytest.approx(whole[0]["score"], abs=1e-5)
    cut = post(server, "/score", queries=QUERY, documents=DOCUMENTS[1], truncate_prompt_tokens=30)
    assert cut["usage"]["prompt_tokens"] == 30
    error = post(server, "/rerank", 400, query=QUERY, documents=["x" * 9000])["error"]
    assert error["param"] == "documents" and error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("route", "body", "reason"),
    [
        ("/score", {"queries": "a"}, "send queries and documents"),
        ("/score", {"queries": ["a", "b"], "documents": ["a", "b", "c"]}, "2 cannot be paired with 3 documents"),
        ("/score", {"queries": "a", "documents": []}, "send at least one"),
        ("/rerank", {"query": "a", "documents": [{"image": "b"}]}, "`documents[0]` must be a text, "),
        ("/rerank", {"documents": ["a"]}, "query"),
        ("/rerank", {"query": "a", "documents": ["a"], "model": "moods"}, "has 2 labels: only a classifier with one"),
        ("/v2/rerank", {"query": "a", "documents": ["a"] * 1025}, "1024"),
    ],
)
def test_what_cannot_be_scored_is_an_error_in_openais_words(
    route: str, body: dict[str, Any], reason: str, server: Server
) -> None:
    error = post(server, route, 400, **body)["error"]
    assert reason in error["message"] and error["type"] == "invalid_request_error"


def test_a_model_without_a_classifier_compares_embeddings(model: Path) -> None:
    with Server(str(model), "--kv-blocks=128", "--threads=1") as server, Client(server.address) as client:
        vectors = [torch.tensor(each.values) for each in client.embed([QUERY, *DOCUMENTS])]
        expected = [float(cosine_similarity(vectors[0], other, dim=0)) for other in vectors[1:]]
        found = post(server, "/score", queries=QUERY, documents=DOCUMENTS)
        assert [each["score"] for each in found["data"]] == pytest.approx(expected, abs=1e-4)
        ranked = post(server, "/rerank", query=QUERY, documents=DOCUMENTS)["results"]
        assert [each["relevance_score"] for each in ranked] == pytest.approx(sorted(expected, reverse=True), abs=1e-4)
        shortened = post(server, "/rerank", query=QUERY, documents=[DOCUMENTS[1]], max_tokens_per_doc=5)["results"]
        (short,) = client.embed([DOCUMENTS[1][:5]])
        likeness = float(cosine_similarity(vectors[0], torch.tensor(short.values), dim=0))
        assert shortened[0]["relevance_score"] == pytest.approx(likeness, abs=1e-4)
