"""Creates a router's telemetry from its settings."""

from collections.abc import Iterator
from contextlib import contextmanager

from loraplex_protos.errors import LoraplexError
from loraplex_router.settings import EdgeSettings
from loraplex_router.telemetry.request_log import RequestLog
from loraplex_router.telemetry.telemetry import Telemetry


@contextmanager
def open_telemetry(settings: EdgeSettings) -> Iterator[Telemetry]:
    """Sends remaining spans at the end. Raises LoraplexError if tracing is on but its packages are missing."""
    telemetry = Telemetry(settings.metrics_adapters, RequestLog(settings.log_prompts))
    if settings.lorax_metrics:
        telemetry.add_lorax_names()
    if settings.gateway_metrics:
        telemetry.add_gateway_names()
    if settings.otlp_endpoint:
        _add_traces(telemetry, settings)
    try:
        yield telemetry
    finally:
        if telemetry.traces is not None:
            telemetry.traces.close()


def _add_traces(telemetry: Telemetry, settings: EdgeSettings) -> None:
    try:
        from loraplex_protos.tracing import open_provider
        from loraplex_router.telemetry.propagation import GrpcTraceContext, HttpTraceContext
        from loraplex_router.telemetry.traces import Traces
    except ModuleNotFoundError as error:
        raise LoraplexError(f"--otlp-endpoint needs {error.name}: pip install 'loraplex[traces]'") from error
    telemetry.traces = Traces(open_provider("loraplex-router", settings.otlp_endpoint, settings.trace_sampling))
    telemetry.interceptors = (GrpcTraceContext(),)
    telemetry.middleware = (HttpTraceContext,)
