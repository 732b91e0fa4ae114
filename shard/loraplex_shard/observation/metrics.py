"""What Prometheus reads of one rank: steps, adapters by tier, and the process. May be told from any thread.

The tiers that an adapter is brought to are disk (fetched and read), host (checked, cut and held) and device (a slot).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_protos.errors import LoraplexError
from loraplex_protos.shard_pb2 import DeviceMemory, GetInfoResponse, StepRequest, StepResponse

STEP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
LOAD_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class ShardMetrics:
    """The metrics of one rank, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._step = Histogram(
            "loraplex_shard_step_duration_seconds", "Steps.", buckets=STEP_SECONDS, registry=registry
        )
        self._tokens = Histogram(
            "loraplex_shard_step_tokens", "Tokens computed in a step.", buckets=TOKENS, registry=registry
        )
        self._failed = Counter("loraplex_shard_failed_chunks", "Sequences that a step failed.", registry=registry)
        self._loads = Histogram(
            "loraplex_shard_adapter_load_seconds",
            "Adapters brought to a tier.",
            ("tier",),
            buckets=LOAD_SECONDS,
            registry=registry,
        )
        self._load_failures = Counter(
            "loraplex_shard_adapter_load_failures",
            "Adapters that a tier did not get.",
            ("tier", "error"),
            registry=registry,
        )
        self._evictions = Counter(
            "loraplex_shard_adapter_evictions", "Adapters that left a tier.", ("tier",), registry=registry
        )
        ProcessCollector(registry=registry)

    def describe(self, info: GetInfoResponse) -> None:
        """Says which version serves which model, as which rank."""
        labels = {"version": version("loraplex"), "model": info.model_id, "rank": str(info.rank)}
        build = Gauge("loraplex_shard_build_info", "Version, model and rank.", labels, registry=self.registry)
        build.labels(**labels).set(1)
        blocks = Gauge("loraplex_shard_kv_blocks", "Blocks of the KV cache.", registry=self.registry)
        blocks.set(info.num_blocks)
        memory = Gauge("loraplex_shard_memory_bytes", "What memory is divided into.", ["part"], registry=self.registry)
        for part in DeviceMemory.DESCRIPTOR.fields:
            memory.labels(part.name).set(getattr(info.memory, part.name))

    def watch_adapters(self, count: Callable[[], Mapping[str, int]], size: Callable[[], Mapping[str, int]]) -> None:
        """Adds the gauges: adapters by tier, and what those on the host and the device take, in bytes."""
        self.registry.register(_Adapters(count, size))

    def step(self, plan: StepRequest, response: StepResponse) -> None:
        """A step has run."""
        self._step.observe(response.duration_us / 1e6)
        self._tokens.observe(sum(plan.lengths))
        self._failed.inc(len(response.failed_chunks))

    @contextmanager
    def loading(self, tier: str) -> Iterator[None]:
        """Within it an adapter is brought to a tier."""
        began = time.monotonic()
        try:
            yield
        except LoraplexError as error:
            self._load_failures.labels(tier, error.error_type).inc()
            raise
        self._loads.labels(tier).observe(time.monotonic() - began)

    def evicted(self, tier: str) -> None:
        self._evictions.labels(tier).inc()

    def serve(self, host: str, port: int) -> int:
        """Answers `GET /metrics` on a thread until the process ends. Returns the port; OSError if it is taken."""
        server, _ = start_http_server(port, host, self.registry)
        return server.server_port


class _Adapters(Collector):
    def __init__(self, count: Callable[[], Mapping[str, int]], size: Callable[[], Mapping[str, int]]) -> None:
        self._count = count
        self._size = size

    def collect(self) -> Iterator[Metric]:
        adapters = GaugeMetricFamily("loraplex_shard_adapters", "Adapters, by tier.", labels=["tier"])
        for tier, count in self._count().items():
            adapters.add_metric([tier], count)
        yield adapters
        for tier, size in self._size().items():
            yield GaugeMetricFamily(
                f"loraplex_shard_adapter_{tier}_bytes", f"Memory of the {tier} that adapters take.", value=size
            )
