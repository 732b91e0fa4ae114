"""LoRAX's metrics under LoRAX's names, for dashboards made for LoRAX.

LoRAX's counters have no `_total`, so they are exported as untyped samples, which are the same to queries. A step that
computes any prompt has the method `prefill`. https://github.com/predibase/lorax, router/src
"""

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily, UnknownMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_protos import errors
from loraplex_router.engine.generation import Generation
from loraplex_router.telemetry.state import ReplicaState, Snapshot

SECONDS = tuple(0.00015 * 1.5**n for n in range(35))
TOKENS = tuple(2**n for n in range(18))
FAILURES = {
    errors.InvalidRequestError.error_type: "validation",
    errors.OverloadedError.error_type: "overloaded",
    errors.RateLimitedError.error_type: "overloaded",
    errors.AdapterNotFoundError.error_type: "download_adapter",
    errors.AdapterForbiddenError.error_type: "download_adapter",
    errors.AdapterSourceError.error_type: "download_adapter",
    errors.AdapterInvalidError.error_type: "load_adapter",
    "cancelled": "dropped",
}  # anything else: generation


class LoraxMetrics(Collector):
    """Must be told of each request and step."""

    def __init__(self, registry: CollectorRegistry, replicas: Mapping[str, ReplicaState]) -> None:
        def histogram(name: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"lorax_{name}", "As in LoRAX.", labels, buckets=buckets, registry=registry)

        self._duration = histogram("request_duration", SECONDS)
        self._validation = histogram("request_validation_duration", SECONDS)
        self._queue = histogram("request_queue_duration", SECONDS)
        self._inference = histogram("request_inference_duration", SECONDS)
        self._per_token = histogram("request_mean_time_per_token_duration", SECONDS)
        self._input = histogram("request_input_length", TOKENS)
        self._most = histogram("request_max_new_tokens", TOKENS)
        self._generated = histogram("request_generated_tokens", TOKENS)
        self._steps = histogram("batch_inference_duration", SECONDS, "method")
        self._sizes = histogram("batch_next_size", TOKENS)
        self._successes = 0
        self._failures: Counter[str] = Counter()
        self._methods: Counter[str] = Counter()
        registry.register(self)
        self.gauges = _Gauges(replicas)
        registry.register(self.gauges)

    def ended(self, generation: Generation, outcome: str, now: float) -> None:
        """A queued request has ended, at a time from time.monotonic."""
        if outcome != "finished":
            return self.refused(outcome)
        self._successes += 1
        started = generation.started or now
        tokens = sum(output.generated for output in generation.outputs)
        sequence = generation.outputs[0].sequence
        self._duration.observe(now - generation.arrived)
        self._validation.observe(generation.validated - generation.arrived)
        self._queue.observe(started - generation.validated)
        self._inference.observe(now - started)
        self._per_token.observe((now - started) / max(1, tokens))
        self._input.observe(sequence.prompt_length)
        self._most.observe(sequence.max_new_tokens)
        self._generated.observe(tokens)

    def refused(self, outcome: str) -> None:
        self._failures[FAILURES.get(outcome, "generation")] += 1

    def step(self, prefill: bool, seconds: float, sequences: int) -> None:
        method = "prefill" if prefill else "decode"
        self._methods[method] += 1
        self._steps.labels(method).observe(seconds)
        self._sizes.observe(sequences)

    def describe(self) -> Iterator[Metric]:
        yield from ()

    def collect(self) -> Iterator[Metric]:
        failures, methods = self._failures.copy(), self._methods.copy()
        requests = self._successes + failures.total()
        yield UnknownMetricFamily("lorax_request_count", "Requests.", requests)
        yield UnknownMetricFamily("lorax_request_success", "Requests that were answered.", self._successes)
        failed = UnknownMetricFamily("lorax_request_failure", "Requests that failed.", labels=["err"])
        for cause, count in failures.items():
            failed.add_metric([cause], count)
        yield failed
        for name in ("count", "success"):
            steps = UnknownMetricFamily(f"lorax_batch_inference_{name}", "Steps.", labels=["method"])
            for method, count in methods.items():
                steps.add_metric([method], count)
            yield steps


class _Gauges(Snapshot):
    def read(self) -> Iterator[Metric]:
        schedulers = [replica.scheduler for replica in self.replicas.values()]
        waiting = sum(scheduler.num_waiting for scheduler in schedulers)
        running = sum(scheduler.num_running for scheduler in schedulers)
        yield GaugeMetricFamily("lorax_queue_length", "Sequences that wait.", waiting)
        yield GaugeMetricFamily("lorax_batch_current_size", "Sequences that run.", running)
