"""Classification through the unmodified lorax-client, and which client's errors a malformed body gets."""

import json
import subprocess
from pathlib import Path

import pytest
import requests
import torch
from transformers import AutoModelForTokenClassification, pipeline

from tests.e2e.processes import Server
from tests.e2e.tiny import byte_tokenizer, save_classifier

TEXTS = ["John Smith lives in Paris, as does Jane.", "Nobody"]
LABELS = ["O", "B-PER", "I-PER"]

# lorax-client names no adapter when it classifies: the model itself must.
SCRIPT = """
import json, sys
from lorax import Client
client, texts = Client(sys.argv[1]), json.loads(sys.argv[2])
alone, batch = client.classify(texts[0]), client.classify_batch(texts)
assert alone == batch[0]
print(json.dumps([found.entities for found in batch]))
"""


@torch.inference_mode()
def test_lorax_client_finds_the_entities_of_transformers_pipeline(old_python: Path, tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "model", of_tokens=True, id2label=dict(enumerate(LABELS)), label2id={})
    oracle = pipeline(
        "token-classification",
        model=AutoModelForTokenClassification.from_pretrained(model),
        tokenizer=byte_tokenizer(),
        aggregation_strategy="simple",
    )
    with Server(str(model), "--kv-blocks=64", "--threads=1") as server:
        command = [str(old_python), "-c", SCRIPT, server.url, json.dumps(TEXTS)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        server.assert_nothing_is_held()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert any(found)
    for ours, theirs in zip(found, map(oracle, TEXTS), strict=True):
        assert [(each["entity"], each["start"], each["end"]) for each in ours] == [
            (each["entity_group"], each["start"], each["end"]) for each in theirs
        ]


@pytest.mark.parametrize("body", [{}, [], {"inputs": 5}, {"inputs": 5, "input": "Hello"}, {"text": "Hello"}])
def test_errors_have_loraxs_form(server: Server, body: object) -> None:
    answer = requests.post(f"{server.url}/classify", json=body, timeout=60)
    assert answer.status_code == 422 and answer.json()["error_type"] == "validation"


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"model": "first"}, "input"),
        ({"input": "Hello", "truncate_prompt_tokens": "all"}, "truncate_prompt_tokens"),
        ({"messages": 5}, "messages"),
        ({"input": "Hello"}, "model"),
        ({"input": [[1, 999]]}, "input"),
    ],
)
def test_errors_of_vllms_bodies_have_vllms_form(server: Server, body: object, wrong: str) -> None:
    answer = requests.post(f"{server.url}/classify", json=body, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == wrong
