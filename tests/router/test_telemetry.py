"""What the router counts, under which labels, and what it logs about requests."""

import asyncio
import json
import logging
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_protos.adapter_names import is_id
from loraplex_protos.errors import AdapterNotFoundError, ForbiddenError, InvalidRequestError, UnauthenticatedError
from loraplex_router.access.keys import TenantSettings
from loraplex_router.telemetry.labels import AdapterLabels
from loraplex_router.telemetry.request_log import RequestLog
from loraplex_router.usage.event import Used
from loraplex_router.vocabulary.adapter import BASE_NAME, OTHER
from loraplex_router.vocabulary.references import AdapterReference
from loraplex_router.vocabulary.request import EmbedRequest, Request
from tests.router.test_engine import Setup
from tests.router.test_http_streams import Client
from tests.router.test_keys import hashed
from tests.router.test_text import TOKENIZER
from tests.tools import needs_promtool


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    made = Setup()
    made.telemetry.add_lorax_names()
    task = asyncio.create_task(made.engine.run())
    yield made
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def reader(setup: Setup) -> Callable[..., float | None]:
    """The current samples by name and labels."""
    await setup.telemetry.scrape()
    return lambda name, **labels: setup.telemetry.registry.get_sample_value(name, labels)


async def test_requests_are_counted_by_outcome_and_adapter(setup: Setup):
    await asyncio.gather(setup.answer(1), setup.answer(1), setup.answer(1, adapter="a"))
    with pytest.raises(AdapterNotFoundError):
        await setup.answer(1, adapter="absent")
    with pytest.raises(InvalidRequestError):
        await setup.answer(1, tokens=0)
    value = await reader(setup)
    assert value("loraplex_requests_total", outcome="finished", adapter="[base]") == 2
    assert value("loraplex_requests_total", outcome="finished", adapter="a") == 1
    assert value("loraplex_requests_total", outcome=AdapterNotFoundError.error_type, adapter=OTHER) == 1
    assert value("loraplex_requests_total", outcome=InvalidRequestError.error_type, adapter=OTHER) == 1
    assert value("lorax_request_count") == 5
    assert value("lorax_request_success") == 3
    assert value("lorax_request_failure", err="validation") == 1


async def test_adapters_called_base_and_other_share_nothing_with_what_is_shown_for_no_adapter(setup: Setup):
    told: list[dict[str, object]] = []
    setup.telemetry.usage.sinks.append(told.append)
    names = [None, "base", "other", "merged"]
    for count, name in enumerate(names, 1):
        await asyncio.gather(*(setup.answer(1, adapter=name) for _ in range(count)))
    with pytest.raises(AdapterNotFoundError):
        await setup.answer(1, adapter="absent")
    client = Client(setup, "/usage")
    await client.run()
    used = json.loads("".join(client.bodies))["usage"]
    requests = {"[base]": 1, "base": 2, "other": 3, "merged": 4}
    assert {(each["tenant"], each["adapter"]): each["requests"] for each in used} == {
        (None, name): count for name, count in requests.items()
    }
    assert Counter(event["adapter"] for event in told) == requests
    value = await reader(setup)
    for name, count in requests.items():
        assert value("loraplex_requests_total", outcome="finished", adapter=name) == count
    assert value("loraplex_requests_total", outcome=AdapterNotFoundError.error_type, adapter="[other]") == 1
    assert not any(map(is_id, (BASE_NAME, OTHER)))


@pytest.fixture
async def guarded() -> AsyncIterator[Setup]:
    tenants = {"acme": {}, "operator": {"admin": True}}
    made = Setup(tenants={name: TenantSettings(keys=[hashed(name)], **may) for name, may in tenants.items()})
    made.telemetry.add_gateway_names()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(made.engine.run())
        for _ in range(2):
            for adapter in (None, "acme/secret", "acme/other"):
                request = Request(prompt=(1,), adapter=adapter and AdapterReference(adapter), max_new_tokens=2)
                generation = await made.service.generate(request, "acme")
                await generation.collect()
                made.service.requests.close(generation)
        yield made
        running.cancel()


async def test_only_administrators_see_the_names_of_adapters(guarded: Setup):
    named = (await guarded.service.scrape("operator")).decode()
    assert 'adapter="acme/secret"' in named and "acme/secret" in named.split("running_lora_adapters")[-1]
    for key in (None, "acme"):
        text = (await guarded.service.scrape(key)).decode()
        assert "acme" not in text
        assert 'loraplex_requests_total{adapter="[other]",outcome="finished"} 4.0' in text
        assert 'loraplex_requests_total{adapter="[base]",outcome="finished"} 2.0' in text
        assert 'loraplex_queue_wait_seconds_bucket{adapter="[other]",le="+Inf"} 4.0' in text
        assert len(text.splitlines()) < len(named.splitlines())
    with pytest.raises(UnauthenticatedError):
        await guarded.service.scrape("wrong")


async def test_tenants_see_their_own_usage_and_administrators_see_everybodys(guarded: Setup):
    request = Request(prompt=(1, 2, 3), max_new_tokens=4)
    generation = await guarded.service.generate(request, "operator")
    await generation.collect()
    guarded.service.requests.close(generation)
    left = await guarded.service.generate(request, "acme")
    guarded.service.requests.close(left)  # before it ran
    of_acme = [("acme", adapter, Used(2, 2, 0, 4)) for adapter in ("[base]", "acme/other", "acme/secret")]
    assert (await guarded.service.usage("acme"))[1] == of_acme
    assert (await guarded.service.usage("operator"))[1] == [*of_acme, ("operator", "[base]", Used(1, 3, 0, 4))]
    text = (await guarded.service.scrape("operator")).decode()
    assert 'loraplex_tenant_requests_total{tenant="acme"} 6.0' in text
    assert 'loraplex_tenant_generated_tokens_total{tenant="operator"} 4.0' in text
    assert b'loraplex_tenant_prompt_tokens_total{tenant="[other]"} 9.0' in await guarded.service.scrape()


async def test_metrics_may_be_for_administrators_alone_or_for_everybody(guarded: Setup):
    guarded.service._metrics_auth = "all"
    with pytest.raises(UnauthenticatedError):
        await guarded.service.scrape()
    with pytest.raises(ForbiddenError):
        await guarded.service.scrape("acme")
    assert b"acme/secret" in await guarded.service.scrape("operator")
    guarded.service._metrics_auth = "none"
    assert b"acme/secret" in await guarded.service.scrape()


async def test_without_keys_everybody_sees_the_names(setup: Setup):
    await setup.answer(1, adapter="a")
    for key in (None, "a token for the hub"):
        assert b'adapter="a"' in await setup.service.scrape(key)


async def test_content_with_two_names_is_counted_by_name(setup: Setup):
    setup.shards.digests = {"a": "same", "c": "same"}
    setup.shards.loads_held.clear()
    waiting = [asyncio.create_task(setup.answer(1, adapter=name)) for name in "aac"]
    while not (adapter := setup.pool.get("same")) or adapter.waiting < 3:
        await asyncio.sleep(0)
    value = await reader(setup)
    counts = {"a": 2, "c": 1}
    for name, count in counts.items():
        assert value("loraplex_adapter_sequences", adapter=name, state="waiting") == count
    setup.shards.loads_held.set()
    await asyncio.gather(*waiting)
    value = await reader(setup)
    for name, count in counts.items():
        assert value("loraplex_requests_total", outcome="finished", adapter=name) == count


async def test_tokens_times_and_batches_are_measured(setup: Setup):
    await setup.answer(1, tokens=5, adapter="a")
    value = await reader(setup)
    assert value("loraplex_adapter_generated_tokens_total", adapter="a") == 5
    assert value("loraplex_adapter_prompt_tokens_total", adapter="a") == 1
    assert value("loraplex_queue_wait_seconds_count", adapter="a") == 1
    assert value("loraplex_time_to_first_token_seconds_count") == 1
    assert value("loraplex_inter_token_seconds_count") == 4
    assert value("loraplex_request_duration_seconds_sum") >= value("loraplex_inter_token_seconds_sum")
    assert value("loraplex_step_duration_seconds_count", replica="0") == 5
    assert value("loraplex_step_tokens_total", replica="0", phase="prefill") == 1
    assert value("loraplex_step_tokens_total", replica="0", phase="decode") == 4
    assert value("loraplex_step_adapters_sum", replica="0") == 5
    assert value("loraplex_router_step_seconds_count", replica="0", phase="plan") == 5


async def test_gauges_show_what_is_queued_and_held(setup: Setup):
    setup.shards.loads_held.clear()
    waiting = asyncio.create_task(setup.answer(1, adapter="a"))
    while not (adapter := setup.pool.get("digest of a")) or not adapter.waiting:
        await asyncio.sleep(0)
    value = await reader(setup)
    assert value("loraplex_sequences", replica="0", state="waiting") == 1
    assert value("loraplex_adapter_sequences", adapter="a", state="waiting") == 1
    assert value("loraplex_adapters", replica="0", tier="host") == 1
    setup.shards.loads_held.set()
    await waiting
    value = await reader(setup)
    assert value("loraplex_adapter_sequences", adapter="a", state="waiting") == 0
    assert value("loraplex_adapters", replica="0", tier="device") == 1


async def test_a_removed_replica_has_no_series(setup: Setup):
    await setup.answer(1)
    setup.replicas.remove(setup.replica)
    assert b'replica="0"' not in await setup.telemetry.scrape()


async def test_an_endpoint_picker_finds_its_metrics(setup: Setup):
    setup.telemetry.add_gateway_names()
    await setup.answer(1, adapter="b")
    await setup.answer(1, adapter="a")
    text = (await setup.telemetry.scrape()).decode()
    assert "\nvllm:num_requests_waiting 0.0\n" in text
    assert "\nvllm:num_requests_running 0.0\n" in text
    assert "\nvllm:kv_cache_usage_perc 0.0\n" in text
    assert '\nvllm:cache_config_info{block_size="4",num_gpu_blocks="64"} 1.0\n' in text
    labels = 'max_lora="2",running_lora_adapters="a,b",waiting_lora_adapters=""'
    assert f"\nvllm:lora_requests_info{{{labels}}} " in text


@needs_promtool
async def test_promtool_finds_no_problems(setup: Setup):
    await setup.answer(1, adapter="a")
    setup.telemetry.lorax = None
    lines = (await setup.telemetry.scrape()).decode().splitlines(keepends=True)
    own = "".join(line for line in lines if "lorax_" not in line)  # LoRAX's names cannot be changed
    done = subprocess.run(["promtool", "check", "metrics"], input=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


async def test_a_log_line_describes_a_request_without_its_text(setup: Setup, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    await setup.answer(65, tokens=3, adapter="a", request_id="mine")
    (record,) = [record for record in caplog.records if record.message == "request"]
    fields = record.__dict__["fields"]
    assert (fields["request_id"], fields["adapter"], fields["outcome"]) == ("mine", "a", "finished")
    assert (fields["prompt_tokens"], fields["generated_tokens"], fields["finish"]) == (1, 3, ["length"])
    assert 0 <= fields["queue_ms"] <= fields["first_token_ms"] <= fields["duration_ms"]
    assert "prompt" not in fields and "answers" not in fields


async def test_a_refused_request_is_also_logged(setup: Setup, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    with pytest.raises(AdapterNotFoundError):
        await setup.service.generate(Request(prompt=(1,), adapter=AdapterReference("absent"), max_new_tokens=1))
    (record,) = [record for record in caplog.records if record.message == "request"]
    assert record.__dict__["fields"]["outcome"] == AdapterNotFoundError.error_type
    assert record.__dict__["fields"]["adapter"] == "absent"


async def test_the_log_says_whose_request_was_refused(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    setup = Setup(tenants={"acme": TenantSettings(keys=[hashed("of acme")], adapters=[])})
    request = Request(prompt=(1,), adapter=AdapterReference("a"), max_new_tokens=1, request_id="mine")
    embedding = EmbedRequest(((1,),), adapter=request.adapter, request_id="mine")
    for key, error in ("of acme", ForbiddenError), ("unknown", UnauthenticatedError):
        with pytest.raises(error):
            await setup.service.generate(request, key)
        with pytest.raises(error):
            await setup.service.pooling.embed(embedding, key)
    lines = [record.__dict__["fields"] for record in caplog.records if record.message == "request"]
    assert [(line["tenant"], line["request_id"]) for line in lines] == [("acme", "mine")] * 2 + [(None, "mine")] * 2


async def test_prompts_and_answers_are_logged_if_enabled(setup: Setup, caplog: pytest.LogCaptureFixture):
    generation = await setup.service.generate(Request(prompt=(40, 50), max_new_tokens=2))
    await generation.collect()
    setup.service.requests.close(generation)
    caplog.set_level(logging.INFO)
    RequestLog(prompts=True).ended(generation, "finished", time.monotonic())
    fields = caplog.records[-1].__dict__["fields"]
    assert fields["prompt"] == TOKENIZER.decode([40, 50])
    assert fields["answers"] == [TOKENIZER.decode([51, 52])]


# ---- labels ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30).map(str)), st.integers(0, 5))
def test_the_number_of_labels_is_limited_and_replaced_labels_are_dropped(names: list[str], most: int):
    dropped: list[str] = []
    labels = AdapterLabels(most, dropped.append)
    shown: set[str] = set()
    for name in names:
        label = labels.count(name)
        assert label in (name, OTHER) and label == labels.find(name)
        shown.update(labels)
        assert len(list(labels)) <= most
        assert set(labels) | set(dropped) == shown


def test_a_popular_adapter_gets_a_label_later():
    dropped: list[str] = []
    labels = AdapterLabels(2, dropped.append)
    for name in ("a", "a", "b"):
        labels.count(name)
    assert [labels.count("hot") for _ in range(3)] == [OTHER, OTHER, "hot"]
    assert dropped == ["b"] and labels.find("b") == OTHER


def test_old_requests_count_less():
    labels = AdapterLabels(1, lambda _: None)
    for _ in range(1000):
        labels.count("old")
    for _ in range(6 * 4096):
        labels.count("a" if _ % 3 else "b")
    assert labels.find("old") == OTHER


def test_labels_are_short_and_printable():
    labels = AdapterLabels(1, lambda _: None)
    label = labels.count("a\n\ud800" + "x" * 1000)
    assert label.startswith("a??xx") and len(label) == 128
    alike = AdapterLabels(2, lambda _: None)
    assert len({alike.count("x" * 200 + end) for end in "ab"}) == 2
    label.encode()
