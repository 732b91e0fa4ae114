"""What Prometheus reads: counters that the engine advances, and gauges read from its state at scrape time."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_protos import shard_pb2 as pb
from loraplex_router.adapters.pool import AdapterPool
from loraplex_router.blocks import BlockAllocator
from loraplex_router.output import Generation
from loraplex_router.scheduler import Scheduler
from loraplex_router.sequence import FinishReason, Plan

STEP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """The counters. Nothing here grows with the number of adapters or requests."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("loraplex_requests", "Requests that ended, by outcome.", "outcome")
        self._prompt = self._counter("loraplex_prompt_tokens", "Prompt tokens of requests that ended.")
        self._hits = self._counter("loraplex_prefix_hit_tokens", "Prompt tokens found in the prefix cache.")
        self._generated = self._counter("loraplex_generated_tokens", "Tokens sampled.")
        self._step = Histogram(
            "loraplex_step_duration_seconds",
            "Steps, on the shard's clock.",
            buckets=STEP_SECONDS,
            registry=self.registry,
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def step(self, plan: Plan, response: pb.StepResponse) -> None:
        self._step.observe(response.duration_us / 1e6)
        self._generated.inc(len(response.tokens))

    def ended(self, generation: Generation) -> None:
        self._requests.labels(_outcome(generation)).inc()
        self._prompt.inc(generation.outputs[0].sequence.prompt_length)
        self._hits.inc(sum(output.sequence.prefix_hit for output in generation.outputs))

    def watch(self, scheduler: Scheduler, blocks: BlockAllocator, pool: AdapterPool) -> None:
        """Adds the gauges."""
        self.registry.register(_State(scheduler, blocks, pool))


def _outcome(generation: Generation) -> str:
    if generation.error is not None:
        return generation.error.error_type
    reasons = {output.finish_reason for output in generation.outputs}
    return "cancelled" if FinishReason.CANCELLED in reasons else "finished"


class _State(Collector):
    def __init__(self, scheduler: Scheduler, blocks: BlockAllocator, pool: AdapterPool) -> None:
        self._scheduler, self._blocks, self._pool = scheduler, blocks, pool

    def collect(self) -> Iterator[Metric]:
        sequences = GaugeMetricFamily("loraplex_sequences", "Sequences, by state.", labels=["state"])
        sequences.add_metric(["running"], self._scheduler.num_running)
        sequences.add_metric(["waiting"], self._scheduler.num_waiting)
        yield sequences
        blocks = GaugeMetricFamily("loraplex_kv_blocks", "Blocks of the KV cache, by state.", labels=["state"])
        blocks.add_metric(["used"], self._blocks.used)
        blocks.add_metric(["cached"], self._blocks.cached)
        blocks.add_metric(["free"], self._blocks.available - self._blocks.cached)
        yield blocks
        adapters = GaugeMetricFamily("loraplex_adapters", "Staged adapters, by tier.", labels=["tier"])
        on_device = sum(adapter.ready for adapter in self._pool)
        adapters.add_metric(["device"], on_device)
        adapters.add_metric(["host"], len(list(self._pool)) - on_device)
        yield adapters
        yield GaugeMetricFamily(
            "loraplex_preemptions", "Sequences preempted since the start.", value=self._scheduler.num_preemptions
        )
