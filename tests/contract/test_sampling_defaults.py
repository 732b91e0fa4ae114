"""Sampling defaults on OpenAI's routes come from generation_config.json; requests take precedence."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex_protos import generation_pb2
from loraplex_protos.shard_pb2 import GetInfoResponse, GetTokenizerResponse
from loraplex_router.text.model import read_model
from loraplex_router.vocabulary.sampling import Sampling
from tests.contract.test_served_names import call
from tests.e2e.processes import Server
from tests.e2e.tiny import save_adapter

PROMPT = "Once upon"
LIKELIEST_ALONE = {"do_sample": True, "temperature": 50.0, "top_k": 1}


@pytest.fixture(scope="module")
def opinionated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The adapter "wild" has defaults of its own."""
    folder = tmp_path_factory.mktemp("opinionated")
    directory = shutil.copytree(model, folder / "model")
    (directory / "generation_config.json").write_text(json.dumps(LIKELIEST_ALONE))
    for name in "mild", "wild":
        save_adapter(model, folder / "adapters" / name, 2, 1)
    (folder / "adapters/wild/generation_config.json").write_text(json.dumps({"top_k": 40, "temperature": 2.0}))
    flags = "--kv-blocks=64", "--threads=1", f"--adapters={folder / 'adapters'}"
    with Server(str(directory), *flags) as running:
        yield running


def completed(server: Server, **fields: Any) -> str:
    body = {"prompt": PROMPT, "max_tokens": 16, "seed": 1} | fields
    status, answer = call(server, "/v1/completions", body)
    assert status == 200
    return str(answer["choices"][0]["text"])


def generated(server: Server, **parameters: Any) -> str:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 16, "seed": 1} | parameters}
    return str(call(server, "/generate", body)[1]["generated_text"])


def test_omitted_parameters_have_the_models_defaults(opinionated: Server) -> None:
    assert completed(opinionated) == completed(opinionated, temperature=0)


def test_a_requests_parameters_take_precedence(opinionated: Server) -> None:
    likeliest = completed(opinionated)
    assert completed(opinionated, top_k=-1) != likeliest
    assert completed(opinionated, top_k=0) != likeliest
    assert completed(opinionated, top_k=50) != likeliest


def test_an_adapters_own_defaults_come_before_the_models(opinionated: Server) -> None:
    assert completed(opinionated, model="mild") == completed(opinionated, model="mild", temperature=0)
    own = completed(opinionated, model="wild")
    assert (
        own == completed(opinionated, model="mild", top_k=40, temperature=2.0) != completed(opinionated, model="mild")
    )
    assert completed(opinionated, model="wild", temperature=0) == completed(opinionated, model="mild")


def test_other_faces_keep_their_own_defaults(opinionated: Server) -> None:
    assert generated(opinionated) == completed(opinionated, temperature=0)
    sampled = completed(opinionated, temperature=1, top_k=-1)
    assert generated(opinionated, do_sample=True) == sampled != completed(opinionated)


def test_generation_config_can_be_ignored(model: Path) -> None:
    files = GetTokenizerResponse(tokenizer_json=(model / "tokenizer.json").read_bytes())
    info = GetInfoResponse(sampling_defaults=generation_pb2.Sampling(top_k=20, top_p=0.5))
    read = {setting: read_model(info, files, 1, (), setting).sampling_defaults for setting in ("auto", "vllm")}
    assert read == {"auto": Sampling(top_k=20, top_p=0.5), "vllm": Sampling()}
