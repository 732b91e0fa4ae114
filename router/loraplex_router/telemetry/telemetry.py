"""Observes the router: one call per event, none per token.

Passes each event to the metrics, the log and, if on, the traces. Runs on the engine's event loop.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
from prometheus_client import CollectorRegistry, generate_latest
from starlette.types import ASGIApp

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.errors import LoraplexError
from loraplex_router.engine.generation import Generation
from loraplex_router.telemetry.gateway import GatewayNames
from loraplex_router.telemetry.labels import AdapterLabels
from loraplex_router.telemetry.lorax_names import LoraxMetrics
from loraplex_router.telemetry.metrics import Metrics
from loraplex_router.telemetry.nameless import Nameless
from loraplex_router.telemetry.request_log import RequestLog
from loraplex_router.telemetry.state import ReplicaState, Snapshot, State
from loraplex_router.usage.usage import Usage
from loraplex_router.vocabulary.adapter import OTHER
from loraplex_router.vocabulary.request import EmbedRequest, Request
from loraplex_router.vocabulary.sequence import FinishReason, Plan, Sequence

if TYPE_CHECKING:  # the module needs an extra
    from loraplex_router.telemetry.traces import Traces

Middleware = Callable[[ASGIApp], ASGIApp]


class Telemetry:
    """Observes one router. `adapters` limits how many adapters have their own series."""

    def __init__(self, adapters: int, log: RequestLog) -> None:
        self.metrics = Metrics()
        self.usage = Usage()
        self._live: set[Generation] = set()
        self._labels = AdapterLabels(adapters, self.metrics.forget_adapter)
        self._log = log
        self._replicas: dict[str, ReplicaState] = {}
        self.lorax: LoraxMetrics | None = None
        # Set once, before the servers are created, if tracing is on:
        self.traces: Traces | None = None
        self.interceptors: tuple[grpc.aio.ServerInterceptor, ...] = ()
        self.middleware: tuple[Middleware, ...] = ()
        self.closing: tuple[Callable[[], None], ...] = ()
        self._snapshots: list[Snapshot] = []
        self._add(State(self._replicas, self._labels, self._live))

    @property
    def registry(self) -> CollectorRegistry:
        return self.metrics.registry

    async def scrape(self, names: bool = True) -> bytes:
        """All metrics in Prometheus' format, with or without the `names` of adapters and tenants. The text is generated
        on a thread, since that takes longer than a step may."""
        for snapshot in self._snapshots:
            snapshot.take()
        return await asyncio.to_thread(generate_latest, self.registry if names else Nameless(self.registry))

    def add_lorax_names(self) -> None:
        """Adds LoRAX's metrics."""
        self.lorax = LoraxMetrics(self.registry, self._replicas)
        self._snapshots.append(self.lorax.gauges)

    def add_gateway_names(self) -> None:
        """Adds the metrics for Kubernetes' inference gateways."""
        self._add(GatewayNames(self._replicas))

    def _add(self, snapshot: Snapshot) -> None:
        self._snapshots.append(snapshot)
        self.registry.register(snapshot)

    # ---- requests ----------------------------------------------------------------------------------------------

    @contextmanager
    def admission(self, request: Request | EmbedRequest, arrived: float, tenant: str = "") -> Iterator[None]:
        """A context in which a tenant's request is checked and queued, or refused: what it raises is the outcome."""
        try:
            yield
        except LoraplexError as error:
            self._refused(request, error.error_type, arrived, tenant)
            raise
        except asyncio.CancelledError:
            self._refused(request, "cancelled", arrived, tenant)
            raise
        except Exception:
            self._refused(request, LoraplexError.error_type, arrived, tenant)
            raise

    def queued(self, generation: Generation) -> None:
        self._live.add(generation)
        self.metrics.resumed.inc(any(output.resumed for output in generation.outputs))
        self._labels.count(generation.adapter_name)
        if self.traces is not None:
            self.traces.queued(generation)

    def started(self, generation: Generation) -> None:
        assert generation.started is not None
        self.usage.started(generation)
        label = self._labels.find(generation.adapter_name)
        self.metrics.queue_wait.labels(label).observe(generation.started - generation.validated)
        if self.traces is not None:
            self.traces.started(generation)

    def started_again(self, generation: Generation, sequence: Sequence) -> None:
        if self.traces is not None:
            self.traces.started_again(generation, sequence)

    def first_token(self, generation: Generation) -> None:
        assert generation.first_token is not None
        self.metrics.first_token.observe(generation.first_token - generation.arrived)
        if self.traces is not None:
            self.traces.first_token(generation)

    def ended(self, generation: Generation) -> None:
        """It finished, failed or was cancelled."""
        self._live.discard(generation)
        metrics, now = self.metrics, time.monotonic()
        label = self._labels.find(generation.adapter_name)
        outcome = _outcome(generation)
        prompt_tokens, generated_tokens = generation.prompt_length, generation.num_generated
        metrics.requests.labels(outcome, label).inc()
        metrics.duration.observe(now - generation.arrived)
        metrics.prompt_length.observe(prompt_tokens)
        metrics.output_length.observe(generated_tokens)
        metrics.prompt.inc(prompt_tokens)
        metrics.hits.inc(sum(output.sequence.prefix_hit for output in generation.outputs))
        metrics.adapter_prompt.labels(label).inc(prompt_tokens)
        metrics.adapter_generated.labels(label).inc(generated_tokens)
        self.usage.ended(generation, outcome, now)
        if generation.tenant and generation.started is not None:
            metrics.tenant_requests.labels(generation.tenant).inc()
            metrics.tenant_prompt.labels(generation.tenant).inc(prompt_tokens)
            metrics.tenant_generated.labels(generation.tenant).inc(generated_tokens)
        self._log.ended(generation, outcome, now)
        if self.lorax is not None:
            self.lorax.ended(generation, outcome, now)
        if self.traces is not None:
            self.traces.ended(generation, outcome, now)

    def _refused(self, request: Request | EmbedRequest, outcome: str, arrived: float, tenant: str) -> None:
        """Its adapter may be any text, so it gets no label."""
        self.metrics.requests.labels(outcome, OTHER).inc()
        self._log.refused(request, tenant, outcome, time.monotonic() - arrived)
        if self.lorax is not None:
            self.lorax.refused(outcome)
        if self.traces is not None:
            self.traces.refused(request, outcome, arrived)

    # ---- replicas ------------------------------------------------------------------------------------------------

    def replica(self, name: str) -> "ReplicaTelemetry":
        """The events of a replica; `name` is the label of its series."""
        return ReplicaTelemetry(self, name)

    def watch(self, replica: ReplicaState) -> None:
        """A replica is ready: adds its gauges."""
        self._replicas[replica.name] = replica
        self.metrics.replica_starts.inc()

    def silent(self) -> None:
        self.metrics.replica_silences.inc()

    def lost(self, reason: str) -> None:
        self.metrics.replica_losses.labels(reason).inc()

    def forget(self, name: str) -> None:
        """Drops the series of a replica that is gone."""
        self._replicas.pop(name, None)
        self.metrics.forget_replica(name)


class ReplicaTelemetry:
    """The events of one replica's engine and shards. Requests may move from one replica to another."""

    def __init__(self, router: Telemetry, name: str) -> None:
        self._router = router
        self._name = name
        self.started, self.started_again = router.started, router.started_again
        self.first_token, self.ended = router.first_token, router.ended
        metrics = router.metrics
        self._step = metrics.step.labels(name)
        self.planned = metrics.overhead.labels(name, "plan").observe  # takes the router's time for it, in seconds
        self.applied = metrics.overhead.labels(name, "apply").observe
        self._generated = metrics.generated.labels(name)
        self._prefill_tokens = metrics.step_tokens.labels(name, "prefill")
        self._decode_tokens = metrics.step_tokens.labels(name, "decode")
        self._sequences = metrics.step_sequences.labels(name)
        self._adapters = metrics.step_adapters.labels(name)
        self._inter_token = metrics.inter_token
        self._latencies = metrics.rank_latency
        self._last_result = 0.0

    def step(self, plan: Plan, response: pb.StepResponse) -> None:
        """A step's result has arrived."""
        now = time.monotonic()
        decodes = [chunk.length for chunk in plan.chunks if chunk.start >= chunk.sequence.prompt_length]
        self._step.observe(response.duration_us / 1e6)
        self._generated.inc(len(response.tokens))
        self._decode_tokens.inc(sum(decodes))
        self._prefill_tokens.inc(sum(chunk.length for chunk in plan.chunks) - sum(decodes))
        self._sequences.observe(len(plan.chunks))
        self._adapters.observe(sum(adapter.slot != 0 for adapter in plan.adapters))
        if decodes:  # their previous tokens came with the previous result
            self._inter_token.observe(now - self._last_result, len(decodes))
        self._last_result = now
        if self._router.lorax is not None:
            self._router.lorax.step(len(decodes) < len(plan.chunks), response.duration_us / 1e6, len(plan.chunks))
        if self._router.traces is not None:
            self._router.traces.step(plan)

    def rank_latency(self, rank: int, seconds: float) -> None:
        """A step's time beyond the rank's own."""
        self._latencies.labels(self._name, str(rank)).observe(seconds)

    @contextmanager
    def loading(self, tier: str) -> Iterator[None]:
        """A context in which an adapter is loaded into a tier: host or device."""
        began = time.monotonic()
        try:
            yield
        except LoraplexError as error:
            self._router.metrics.load_failures.labels(tier, error.error_type).inc()
            raise
        self._router.metrics.loads.labels(tier).observe(time.monotonic() - began)

    def evicted(self, tier: str) -> None:
        self._router.metrics.evictions.labels(tier).inc()


def _outcome(generation: Generation) -> str:
    if generation.error is not None:
        return generation.error.error_type
    reasons = {output.finish_reason for output in generation.outputs}
    return "cancelled" if FinishReason.CANCELLED in reasons else "finished"
