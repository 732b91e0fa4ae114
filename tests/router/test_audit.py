"""The audit's lines: who did what to which adapter or request, and how it ended."""

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from loraplex.cli.logs import JsonFormatter, TextFormatter
from loraplex_protos.errors import (
    AdapterNotFoundError,
    ForbiddenError,
    InvalidRequestError,
    RequestNotFoundError,
    UnauthenticatedError,
)
from loraplex_router.access.keys import TenantSettings
from loraplex_router.vocabulary.references import AdapterReference
from tests.router.test_keys import hashed
from tests.router.test_replicas import Cluster, request

A = AdapterReference("a", token="hf_secret")
TENANTS = {
    "operators": TenantSettings(keys=[hashed("key-of-operators")], admin=True),
    "customers": TenantSettings(keys=[hashed("key-of-customers")]),
}


@pytest.fixture
async def cluster(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Cluster]:
    caplog.set_level(logging.INFO)
    made = Cluster(TENANTS)
    yield made
    await made.close()


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.message == "audit"]


async def test_each_call_of_an_administrator_is_logged_in_one_line(cluster: Cluster, caplog: pytest.LogCaptureFixture):
    service, key = cluster.service, "key-of-operators"
    await service.adapters.load(A, key)
    await service.adapters.pin(A, key)
    await service.adapters.unpin(A, key)
    await service.adapters.unload(A, key=key)
    generation = await service.generate(request(1, 100), key)
    service.cancel_request(generation.request_id, key)
    service.requests.close(generation)
    found = lines(caplog)
    assert [line["action"] for line in found] == ["load", "pin", "unpin", "unload", "cancel"]
    assert {line["tenant"] for line in found} == {"operators"} and {line["outcome"] for line in found} == {"done"}
    assert [line.get("adapter") for line in found] == ["a", "a", "a", "a", None]
    assert found[4]["request_id"] == generation.request_id


async def test_refusals_are_logged_with_the_reason(cluster: Cluster, caplog: pytest.LogCaptureFixture):
    service = cluster.service
    with pytest.raises(ForbiddenError):
        await service.adapters.load(A, "key-of-customers")
    with pytest.raises(UnauthenticatedError):
        await service.adapters.unload(A, key="key-of-nobody")
    with pytest.raises(AdapterNotFoundError):
        await service.adapters.unload(A, key="key-of-operators")
    with pytest.raises(InvalidRequestError):
        await service.adapters.unpin("d" * 1000, "key-of-operators")
    assert lines(caplog)[-1]["digest"] == "d" * 512
    with pytest.raises(RequestNotFoundError):
        service.cancel_request("absent", "key-of-customers")
    assert [(line["tenant"], line["outcome"]) for line in lines(caplog)] == [
        ("customers", "forbidden"),
        (None, "unauthenticated"),
        ("operators", "adapter_not_found"),
        ("operators", "validation"),
        ("customers", "request_not_found"),
    ]
    assert lines(caplog)[2]["error"] == "adapter 'a' is not loaded"


async def test_keys_and_tokens_are_never_logged(cluster: Cluster, caplog: pytest.LogCaptureFixture):
    await cluster.service.adapters.load(A, "key-of-operators")
    (record,) = (record for record in caplog.records if record.message == "audit")
    written = json.loads(JsonFormatter().format(record)), TextFormatter().format(record)
    assert written[0]["action"] == "load" and "action=load tenant=operators adapter=a" in written[1]
    assert not [text for text in map(str, written) if "key-of-" in text or "hf_secret" in text]
