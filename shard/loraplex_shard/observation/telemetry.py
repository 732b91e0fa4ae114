"""What a rank tells operators: its metrics and, where they are on, its spans."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loraplex_protos.shard_pb2 import StepRequest, StepResponse
from loraplex_shard.observation.metrics import ShardMetrics
from loraplex_shard.settings import ShardSettings

if TYPE_CHECKING:  # the module needs an extra
    from loraplex_shard.observation.traces import Traces


class Telemetry:
    """Metrics and traces of one rank."""

    def __init__(self, metrics: ShardMetrics, traces: "Traces | None" = None) -> None:
        self.metrics = metrics
        self._traces = traces

    def step(self, plan: StepRequest, response: StepResponse, began: float, ended: float) -> None:
        """A step has run between two times of time.monotonic."""
        self.metrics.step(plan, response)
        if self._traces is not None:
            self._traces.step(plan, began, ended)

    def close(self) -> None:
        """Sends what was not sent yet."""
        if self._traces is not None:
            self._traces.close()


@contextmanager
def open_telemetry(settings: ShardSettings) -> Iterator[Telemetry]:
    """As the settings say. Metrics are answered until the process ends; OSError if their port is taken."""
    telemetry = Telemetry(ShardMetrics(), _open_traces(settings))
    try:
        if settings.metrics_port:
            telemetry.metrics.serve(settings.metrics_host, settings.metrics_port)
        yield telemetry
    finally:
        telemetry.close()


def _open_traces(settings: ShardSettings) -> "Traces | None":
    if not settings.otlp_endpoint:
        return None
    from loraplex_protos.tracing import open_provider
    from loraplex_shard.observation.traces import Traces

    return Traces(open_provider("loraplex-shard", settings.otlp_endpoint), settings.rank)
