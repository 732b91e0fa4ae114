"""Requests that are refused before any work starts: values that shards cannot take, and tokens without an embedding."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import InvalidRequestError
from loraplex_router.replicas.replicas import Lease
from loraplex_router.service.service import Service
from loraplex_router.text.renderer import Renderer
from loraplex_router.text.tokenizer import Tokenizer
from loraplex_router.vocabulary.chat import Chat, ChatTemplates, Message
from loraplex_router.vocabulary.checks import check_request
from loraplex_router.vocabulary.references import AdapterReference, MergedReference
from loraplex_router.vocabulary.request import EmbedRequest, Prompt, Request
from loraplex_router.vocabulary.sampling import Sampling
from tests.e2e.tiny import CHAT_TEMPLATE, byte_tokenizer
from tests.router.test_engine import MODEL, Setup

LETTERS = 256  # one token each; the next token, [PAD], is missing in the model


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    """The service of a model whose tokenizer has one token more than its embedding has rows."""
    made = byte_tokenizer()
    made.add_tokens(["[PAD]"], special_tokens=True)
    templates = ChatTemplates({"default": CHAT_TEMPLATE})
    tokenizer = Tokenizer(made.backend_tokenizer.to_str().encode())
    info = pb.GetModelInfoResponse(model_id="base", vocab_size=len(made) - 1, max_model_len=50)
    model = replace(MODEL, info=info, tokenizer=tokenizer, chat_templates=templates, renderer=Renderer(templates))
    yield Setup(model=model).service
    await model.renderer.aclose()


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("Hi [PAD]!", "prompt"),
        (Chat((Message("user", "[PAD]"),)), "chat.messages"),
    ],
)
async def test_a_text_with_a_token_that_the_model_lacks_is_refused_by_name(
    service: Service, prompt: Prompt, field: str
):
    with pytest.raises(InvalidRequestError, match=r"'\[PAD\]', which is token 257") as refused:
        await service.generate(Request(prompt))
    assert [violation.field for violation in refused.value.violations] == [field]
    with pytest.raises(InvalidRequestError, match=r"inputs: .*PAD|chat\.messages: .*PAD"):
        await service.pooling.embed(EmbedRequest((prompt,)))
    assert service.requests.idle


async def test_one_version_of_an_adapter_renders_and_tokenizes(service: Service, monkeypatch: pytest.MonkeyPatch):
    sessions, place = list[str](), service._place

    async def place_base(adapter: AdapterReference | None, key: str | None, session: str) -> Lease:
        sessions.append(session)
        return await place(None, key, session)

    monkeypatch.setattr(service, "_place", place_base)
    await service.tokenize(Chat((Message("user", "Hi"),)), False, AdapterReference("alias"))
    rendered, tokenized = sessions
    assert rendered == tokenized != ""


async def test_truncated_tokens_are_not_checked(service: Service):
    generation = await service.generate(Request("[PAD] Hi", truncate=2))
    assert generation.outputs[0].sequence.tokens == await service.tokenizer.encode("Hi")
    service.requests.close(generation)


@pytest.mark.parametrize("token", [-1, 1000, 2**32, 2**64])
@pytest.mark.parametrize("field", ["token_ids", "stop_token_ids", "logit_bias"])
def test_token_ids_that_the_model_lacks_are_refused_in_every_field(field: str, token: int):
    request = {
        "token_ids": Request((1, token)),
        "stop_token_ids": Request((1,), stop_token_ids=(1, token)),
        "logit_bias": Request((1,), sampling=Sampling(logit_bias={token: 1.0})),
    }[field]
    with pytest.raises(InvalidRequestError, match=rf"{field}: every id must be below 1000"):
        check_request(request, vocab_size=1000, sources=())


@pytest.mark.parametrize(
    "options",
    [{"top_k": 2**32}, {"temperature": float("inf")}, {"temperature": float("nan")}, {"repetition_penalty": 1e39}],
    ids=str,
)
def test_values_that_do_not_fit_into_a_plan_are_refused(options: dict[str, float]):
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        check_request(Request((1,), sampling=Sampling(**options)), vocab_size=10, sources=())


def test_every_sampling_parameter_of_the_protocol_is_known():
    assert set(Sampling.model_fields) == set(pb.Sampling.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("source", ["gcs", "pbase", "Hub", " hub"])
def test_an_unknown_source_is_refused_with_a_list_of_the_servers(source: str):
    merged = MergedReference((AdapterReference("sql", "hub"), AdapterReference("sql", source)))
    for adapter, field in (
        (AdapterReference("sql", source), "adapter.source"),
        (merged, "merged_adapters.adapters[1].source"),
    ):
        with pytest.raises(InvalidRequestError, match=r"must be one of this server's \(local, hub\)") as refused:
            check_request(Request((1,), adapter=adapter), 10, ["local", "hub"])
        assert [violation.field for violation in refused.value.violations] == [field]


@pytest.mark.parametrize(
    "id",
    ["sql", "a/b/c/d", "s3://bucket/a/b/c/d/sql", "az://container/sql/", "/srv/adapters/team/sql", "hf://org/name"],
)
def test_an_adapter_is_requested_by_name_or_url(id: str):
    check_request(Request((1,), adapter=AdapterReference(id)), 10, [])


@pytest.mark.parametrize(
    "id", ["a/b/c/d/e", "s3://", "s3://b//x", "s3://b/../x", "/", "/../etc", "//x", "s3:///x", "file://" + "a/" * 17]
)
def test_a_url_cannot_point_elsewhere(id: str):
    with pytest.raises(InvalidRequestError, match=r"adapter\.id"):
        check_request(Request((1,), adapter=AdapterReference(id)), 10, [])
