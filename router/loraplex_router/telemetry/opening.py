"""Creates a router's telemetry from its settings."""

from collections.abc import Iterator
from contextlib import contextmanager

from loraplex_protos.errors import LoraplexError
from loraplex_router.settings import EdgeSettings
from loraplex_router.telemetry.request_log import RequestLog
from loraplex_router.telemetry.telemetry import Telemetry
from loraplex_router.usage.log import UsageLog


@contextmanager
def open_telemetry(settings: EdgeSettings) -> Iterator[Telemetry]:
    """Sends remaining spans and events at the end. Raises LoraplexError if there is a collector but packages are
    missing, OSError if the usage log cannot be opened."""
    telemetry = Telemetry(settings.metrics_adapters, RequestLog(settings.log_prompts))
    if settings.lorax_metrics:
        telemetry.add_lorax_names()
    if settings.gateway_metrics:
        telemetry.add_gateway_names()
    if settings.otlp_endpoint:
        _add_otlp(telemetry, settings)
    if settings.usage_log:
        log = UsageLog(settings.usage_log)
        telemetry.usage.sinks.append(log)
        telemetry.usage.written = log.written
        telemetry.closing += (log.close,)
    try:
        yield telemetry
    finally:
        for close in telemetry.closing:
            close()


def _add_otlp(telemetry: Telemetry, settings: EdgeSettings) -> None:
    try:
        from loraplex_protos.tracing import open_event_provider, open_provider
        from loraplex_router.telemetry.propagation import GrpcTraceContext, HttpTraceContext
        from loraplex_router.telemetry.traces import Traces
        from loraplex_router.usage.otlp import UsageLogEvents
    except ModuleNotFoundError as error:
        raise LoraplexError(f"--otlp-endpoint needs {error.name}: pip install 'loraplex[traces]'") from error
    telemetry.traces = Traces(open_provider("loraplex-router", settings.otlp_endpoint, settings.trace_sampling))
    events = UsageLogEvents(open_event_provider("loraplex-router", settings.otlp_endpoint))
    telemetry.usage.sinks.append(events)
    telemetry.closing = telemetry.traces.close, events.close
    telemetry.interceptors = (GrpcTraceContext(),)
    telemetry.middleware = (HttpTraceContext,)
