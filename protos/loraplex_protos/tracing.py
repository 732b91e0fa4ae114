"""How services send spans and events to an OpenTelemetry collector. Imported only if tracing is on: it needs the extra
`traces`. The SDK's own environment variables (OTEL_EXPORTER_OTLP_HEADERS, OTEL_RESOURCE_ATTRIBUTES ...) are
honoured."""

import time

from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

TIMEOUT = 2.0  # seconds for one batch: a rank that is told to end has 3 s for it, and a router closes two of these
W3C = TraceContextTextMapPropagator()


def open_provider(service: str, endpoint: str, sampling: float = 1.0) -> TracerProvider:
    """A provider that sends spans to `endpoint` over OTLP/gRPC, from a thread. http:// is plain, https:// is TLS.

    sampling: the fraction kept of traces that start here; other traces follow their caller's decision. Shut it down at
    the end.
    """
    sampler = ParentBased(TraceIdRatioBased(sampling))
    resource = Resource.create({"service.name": service})
    provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=TIMEOUT)))
    return provider


def open_event_provider(service: str, endpoint: str) -> LoggerProvider:
    """The same for log events, all of which are sent."""
    provider = LoggerProvider(Resource.create({"service.name": service}), shutdown_on_exit=False)
    provider.add_log_record_processor(BatchLogRecordProcessor(OTLPLogExporter(endpoint=endpoint, timeout=TIMEOUT)))
    return provider


def nanoseconds(monotonic: float) -> int:
    """A time from time.monotonic as nanoseconds since 1970, as in spans."""
    return time.time_ns() - round((time.monotonic() - monotonic) * 1e9)
