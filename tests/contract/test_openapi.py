"""Requests that fit the OpenAPI document, and many that do not, get answers that the document describes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.e2e.processes import Server
from tests.stand_in_hub import StandInHub

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = {schemathesis.GenerationMode.POSITIVE: 12, schemathesis.GenerationMode.NEGATIVE: 6}  # per operation


@pytest.fixture(scope="module")
def small_server(model: Path) -> Iterator[Server]:
    """A server with a short context, so that all answers end soon."""
    flags = "--max-model-len=64", "--kv-blocks=64", "--threads=1"
    with StandInHub() as hub, Server(str(model), *flags, env={"HF_ENDPOINT": hub.url, "HF_TOKEN": ""}) as running:
        yield running
        running.assert_nothing_is_held()


def test_every_answer_is_described_by_the_document(small_server: Server, model: Path) -> None:
    document = schemathesis.openapi.from_url(f"{small_server.url}/openapi.json")
    failures: list[str] = []
    for operation in document.get_all_operations():
        for mode, examples in EXAMPLES.items():
            found = operation.ok()
            if mode is schemathesis.GenerationMode.POSITIVE or found.body:
                failures += check(found, mode, examples, str(model))
    assert not failures, "\n\n".join(failures)


def check(
    operation: schemathesis.APIOperation, mode: schemathesis.GenerationMode, examples: int, model: str
) -> list[str]:
    """Sends generated requests, and describes what is wrong with the answers."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and len(str(case.body.get("model"))) % 2:
            case.body["model"] = model  # generated names rarely exist
        case.call_and_validate(checks=CHECKS, timeout=30)

    try:
        run()
    except (Exception, FailureGroup) as error:
        return [f"{operation.label}: {error}"]
    return []
