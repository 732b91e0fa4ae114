"""The router's counters and histograms, by name. `Telemetry` updates them."""

from collections.abc import Callable, Sequence
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from loraplex_router.telemetry.histogram import WeightedHistogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
WAIT_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 30)  # few, since each is a series per adapter
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
STEP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
OVERHEAD_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
POWERS_OF_TWO = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """Does not grow with the number of requests; series with the label `adapter` are limited."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests that ended, by outcome.", "outcome", "adapter")
        self.resumed = self._counter("resumed", "Generations of resumed streams that continue here.")
        self.queue_wait = self._histogram(
            "queue_wait_seconds", "From a request's validation to its first step.", WAIT_SECONDS, "adapter"
        )
        self.first_token = self._histogram("time_to_first_token_seconds", "From a request to its first token.", SECONDS)
        self.inter_token = WeightedHistogram(
            "loraplex_inter_token_seconds", "Between two tokens of a sequence.", TOKEN_SECONDS, self.registry
        )
        self.duration = self._histogram("request_duration_seconds", "Whole requests.", SECONDS)
        self.prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens per request.", TOKENS)
        self.output_length = self._histogram("request_generated_tokens", "Tokens generated per request.", TOKENS)
        self.prompt = self._counter("prompt_tokens", "Prompt tokens of requests that ended.")
        self.hits = self._counter("prefix_hit_tokens", "Prompt tokens found in the prefix cache.")
        self.adapter_prompt = self._counter("adapter_prompt_tokens", "Prompt tokens of ended requests.", "adapter")
        self.adapter_generated = self._counter("adapter_generated_tokens", "Tokens of ended requests.", "adapter")
        self.tenant_requests = self._counter("tenant_requests", "Requests that ran and ended.", "tenant")
        self.tenant_prompt = self._counter("tenant_prompt_tokens", "Their prompt tokens.", "tenant")
        self.tenant_generated = self._counter("tenant_generated_tokens", "Their generated tokens.", "tenant")

        self.generated = self._counter("generated_tokens", "Tokens sampled.", "replica")
        self.step = self._histogram(
            "step_duration_seconds", "Duration of steps, measured by the shard.", STEP_SECONDS, "replica"
        )
        self.overhead = self._histogram(
            "router_step_seconds", "The router's own work on a step.", OVERHEAD_SECONDS, "replica", "phase"
        )
        self.step_tokens = self._counter("step_tokens", "Tokens computed in steps.", "replica", "phase")
        self.step_sequences = self._histogram("step_sequences", "Sequences in a step.", POWERS_OF_TWO, "replica")
        self.step_adapters = self._histogram(
            "step_adapters", "Distinct adapters in a step, without the base.", POWERS_OF_TWO, "replica"
        )
        self.rank_latency = self._histogram(
            "rank_latency_seconds", "A step's time beyond the rank's own.", OVERHEAD_SECONDS, "replica", "rank"
        )

        self.replica_starts = self._counter("replica_starts", "Replicas that became ready.")
        self.replica_silences = self._counter("replica_silences", "Times that a replica stopped answering for a while.")
        self.replica_losses = self._counter("replica_losses", "Replicas lost, by reason.", "reason")

        self.loads = self._histogram("adapter_load_seconds", "Time to load an adapter into a tier.", SECONDS, "tier")
        self.load_failures = self._counter("adapter_load_failures", "Failed loads of adapters.", "tier", "error")
        self.evictions = self._counter("adapter_evictions", "Adapters that left a tier.", "tier")

        ProcessCollector(registry=self.registry)

    def describe_build(self, model: str) -> None:
        """Exports the version and the model."""
        info = Gauge("loraplex_build_info", "Version and model.", ("version", "model"), registry=self.registry)
        info.labels(version("loraplex"), model).set(1)

    def watch_registry(self, refused: Callable[[], bool]) -> None:
        """Exports whether the registry's file is refused."""
        text = "1 while the adapter registry's file is invalid, and its previous content is served."
        self._gauge("adapter_registry_refused", text).set_function(refused)

    def watch_store(self, fails: Callable[[], bool]) -> None:
        """Exports whether the store that routers share fails."""
        text = "1 while --store does not answer, and routers count limits for themselves."
        self._gauge("store_fails", text).set_function(fails)

    def forget_adapter(self, label: str) -> None:
        """Drops an adapter's series."""
        for metric in (self.requests, self.queue_wait, self.adapter_prompt, self.adapter_generated):
            metric.remove_by_labels({"adapter": label})

    def forget_replica(self, replica: str) -> None:
        """Drops a replica's series."""
        of_replicas = (self.generated, self.step, self.overhead, self.step_tokens)
        for metric in (*of_replicas, self.step_sequences, self.step_adapters, self.rank_latency):
            metric.remove_by_labels({"replica": replica})

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"loraplex_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"loraplex_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"loraplex_{name}", text, labels, buckets=buckets, registry=self.registry)
