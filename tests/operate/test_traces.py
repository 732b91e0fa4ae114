"""One trace per request across router and shards, from a caller's context to an OTLP collector."""

import json
import subprocess
import sys
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import grpc
import pytest
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs_pb
from opentelemetry.proto.collector.logs.v1.logs_service_pb2_grpc import (
    LogsServiceServicer,
    add_LogsServiceServicer_to_server,
)
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from loraplex_protos.generation_pb2 import AdapterReference, GenerateRequest, Stopping
from loraplex_protos.generation_pb2_grpc import GenerationServiceStub
from loraplex_protos.tracing import TIMEOUT
from loraplex_shard.device.troubles import END_SECONDS
from tests.e2e.processes import Server
from tests.e2e.tiny import save_adapter, save_model

CALLER = f"00-{'ab' * 16}-{'cd' * 8}-01"
NOT_SAMPLED = f"00-{'ef' * 16}-{'cd' * 8}-00"
TOKENS = 40


class EventCollector(LogsServiceServicer):
    """Keeps the log events that arrive."""

    def __init__(self) -> None:
        self.events: list[LogRecord] = []

    def Export(
        self, request: logs_pb.ExportLogsServiceRequest, context: grpc.ServicerContext
    ) -> logs_pb.ExportLogsServiceResponse:
        self.events += [
            event for resource in request.resource_logs for scope in resource.scope_logs for event in scope.log_records
        ]
        return logs_pb.ExportLogsServiceResponse()


class Collector(TraceServiceServicer):
    """Keeps the spans that arrive, by trace id."""

    def __init__(self) -> None:
        self.usage = EventCollector()
        self.traces: dict[str, list[Span]] = defaultdict(list)
        self.services: set[str] = set()
        self._lock = threading.Lock()

    def Export(
        self, request: pb.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> pb.ExportTraceServiceResponse:
        with self._lock:
            for resource in request.resource_spans:
                attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
                self.services.add(attributes["service.name"])
                for span in (span for scope in resource.scope_spans for span in scope.spans):
                    self.traces[span.trace_id.hex()].append(span)
        return pb.ExportTraceServiceResponse()


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    """The spans of three requests that a collector has received once the server has stopped."""
    model = save_model(tmp_path_factory.mktemp("model"))
    adapters = tmp_path_factory.mktemp("adapters")
    save_adapter(model, adapters / "sql", 4, seed=1)
    collector = Collector()
    listener = grpc.server(ThreadPoolExecutor(4))
    add_TraceServiceServicer_to_server(collector, listener)
    add_LogsServiceServicer_to_server(collector.usage, listener)
    port = listener.add_insecure_port("127.0.0.1:0")
    listener.start()
    try:
        flags = (f"--otlp-endpoint=http://127.0.0.1:{port}", "--trace-sampling=0", f"--adapters={adapters}")
        with Server(str(model), *flags, "--kv-blocks=256", "--threads=1") as server:
            generate_over_grpc(server, CALLER)
            generate_over_http(server, f"00-{'12' * 16}-{'cd' * 8}-01")
            generate_over_grpc(server, NOT_SAMPLED)
            generate_over_grpc(server, None)
            assert server.terminate() == 0
        yield collector
    finally:
        listener.stop(None).wait()


def generate_over_grpc(server: Server, traceparent: str | None) -> None:
    request = GenerateRequest(
        text="Hello", adapter=AdapterReference(id="sql"), stopping=Stopping(max_new_tokens=TOKENS)
    )
    request.stopping.ignore_eos = True
    with grpc.insecure_channel(server.address) as channel:
        metadata = (("traceparent", traceparent),) if traceparent else ()
        GenerationServiceStub(channel).Generate(request, metadata=metadata)


def generate_over_http(server: Server, traceparent: str) -> None:
    body = json.dumps({"prompt": "Hello", "model": "", "max_tokens": 3}).encode()
    headers = {"Content-Type": "application/json", "traceparent": traceparent}
    request = urllib.request.Request(f"{server.url}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 200


def named(spans: list[Span]) -> dict[str, Span]:
    found = {span.name: span for span in spans}
    assert len(found) == len(spans), [span.name for span in spans]
    return found


def test_a_request_is_one_trace_across_router_and_shard(collected: Collector):
    spans = named(collected.traces["ab" * 16])
    assert set(spans) == {"generate", "validate", "queue", "prefill", "decode", "shard prefill", "shard decode"}
    assert collected.services == {"loraplex-router", "loraplex-shard"}
    root = spans.pop("generate")
    assert root.parent_span_id.hex() == "cd" * 8
    assert {span.parent_span_id for span in spans.values()} == {root.span_id}


def test_phases_follow_each_other_within_the_request(collected: Collector):
    spans = named(collected.traces["ab" * 16])
    root = spans["generate"]
    phases = [spans[name] for name in ("validate", "queue", "prefill", "decode")]
    times = [time for phase in phases for time in (phase.start_time_unix_nano, phase.end_time_unix_nano)]
    millisecond = 1_000_000  # the clocks are read separately
    assert all(later - earlier > -millisecond for earlier, later in pairwise(times))
    assert abs(times[0] - root.start_time_unix_nano) < millisecond
    assert abs(times[-1] - root.end_time_unix_nano) < millisecond
    for name in ("prefill", "decode"):
        assert spans[f"shard {name}"].start_time_unix_nano > spans["prefill"].start_time_unix_nano - millisecond


def test_waiting_for_an_adapter_and_decoding_are_events(collected: Collector):
    spans = named(collected.traces["ab" * 16])
    assert [event.name for event in spans["queue"].events] == ["adapter staged", "adapter on the device"]
    assert len(spans["decode"].events) == TOKENS // 16
    assert [event.name for event in spans["shard prefill"].events] == ["chunk"]
    attributes = {a.key: a.value for a in spans["generate"].attributes}
    assert attributes["loraplex.adapter"].string_value == "sql"
    assert attributes["loraplex.outcome"].string_value == "finished"
    assert attributes["gen_ai.usage.output_tokens"].int_value == TOKENS


def test_http_headers_also_carry_the_context(collected: Collector):
    assert named(collected.traces["12" * 16])["generate"].parent_span_id.hex() == "cd" * 8


def test_a_request_that_is_not_sampled_has_no_spans(collected: Collector):
    assert set(collected.traces) == {"ab" * 16, "12" * 16}


def test_without_an_endpoint_opentelemetry_is_not_even_imported():
    script = "import sys, loraplex_router.app, loraplex_shard.serving.server; print('opentelemetry.sdk' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_request_is_a_usage_event(collected: Collector):
    events = [
        {attribute.key: attribute.value for attribute in event.attributes}
        for event in collected.usage.events
        if event.event_name == "loraplex.usage"
    ]
    assert len(events) == 4
    assert all(event["loraplex.outcome"].string_value == "finished" for event in events)
    generated = [
        event["loraplex.generated_tokens"].int_value
        for event in events
        if event["loraplex.adapter"].string_value == "sql"
    ]
    assert generated == [TOKENS] * 3


def test_a_collector_that_does_not_answer_delays_the_end_of_a_rank_by_less_than_the_rank_has():
    assert TIMEOUT < END_SECONDS
