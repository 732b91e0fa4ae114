"""Gauges: the current state of schedulers, blocks and adapter pools."""

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_router.engine.blocks import BlockAllocator
from loraplex_router.engine.generation import Generation
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.engine.scheduler import Scheduler
from loraplex_router.telemetry.labels import AdapterLabels


class ReplicaState(Protocol):
    """The observable state of one replica. Owned by the event loop."""

    name: str
    scheduler: Scheduler
    blocks: BlockAllocator
    pool: AdapterPool

    @property
    def accepting(self) -> bool: ...


class Snapshot(Collector, ABC):
    """Exports what `take` last saw, so that only `take` has to run on the event loop."""

    def __init__(self, replicas: Mapping[str, ReplicaState]) -> None:
        self.replicas = replicas
        self._taken: list[Metric] = []

    @abstractmethod
    def read(self) -> Iterator[Metric]:
        """The current values."""

    def take(self) -> None:
        self._taken = list(self.read())

    def describe(self) -> Iterator[Metric]:
        yield from ()

    def collect(self) -> Iterator[Metric]:
        yield from self._taken


class State(Snapshot):
    """The router's own gauges."""

    def __init__(
        self, replicas: Mapping[str, ReplicaState], labels: AdapterLabels, generations: Collection[Generation]
    ) -> None:
        super().__init__(replicas)
        self._labels = labels
        self._generations = generations

    def read(self) -> Iterator[Metric]:
        yield from self._replica_gauges()
        yield from self._adapter_gauges()
        text = "Tasks of the event loop: connections, requests, and the router's own."
        yield GaugeMetricFamily("loraplex_tasks", text, value=len(asyncio.all_tasks()))

    def _replica_gauges(self) -> Iterator[Metric]:
        text = "Replicas that accept new sequences."
        yield GaugeMetricFamily(
            "loraplex_replicas", text, value=sum(replica.accepting for replica in self.replicas.values())
        )
        yield self._queue_length()
        sequences = _gauge("sequences", "Sequences, by state.", "replica", "state")
        blocks = _gauge("kv_blocks", "Blocks of the KV cache, by state.", "replica", "state")
        adapters = _gauge("adapters", "Staged adapters, by the fastest tier that holds them.", "replica", "tier")
        slots = _gauge("adapter_slots", "Adapters that the device can hold.", "replica")
        preempted = CounterMetricFamily("loraplex_preemptions", "Sequences preempted.", labels=["replica"])
        yielded = CounterMetricFamily("loraplex_yields", "Places given up to others' fair share.", labels=["replica"])
        for name, replica in self.replicas.items():
            sequences.add_metric([name, "running"], replica.scheduler.num_running)
            sequences.add_metric([name, "waiting"], replica.scheduler.num_waiting)
            blocks.add_metric([name, "used"], replica.blocks.used)
            blocks.add_metric([name, "cached"], replica.blocks.cached)
            blocks.add_metric([name, "free"], replica.blocks.available - replica.blocks.cached)
            staged = list(replica.pool)
            on_device = sum(adapter.ready for adapter in staged)
            adapters.add_metric([name, "device"], on_device)
            adapters.add_metric([name, "host"], len(staged) - on_device)
            slots.add_metric([name], replica.pool.slots)
            preempted.add_metric([name], replica.scheduler.num_preemptions)
            yielded.add_metric([name], replica.scheduler.num_yields)
        yield from (sequences, blocks, adapters, slots, preempted, yielded)

    def _queue_length(self) -> Metric:
        """A single series, for autoscalers."""
        waiting = sum(replica.scheduler.num_waiting for replica in self.replicas.values())
        return GaugeMetricFamily("loraplex_queue_length", "Sequences waiting, in all replicas.", value=waiting)

    def _adapter_gauges(self) -> Iterator[Metric]:
        waiting, running = (Counter(dict.fromkeys(self._labels, 0)) for _ in range(2))
        for generation in self._generations:
            label = self._labels.find(generation.adapter_name)
            for output in generation.unfinished:
                (waiting if output.sequence.row is None else running)[label] += 1
        sequences = _gauge("adapter_sequences", "Sequences, by adapter and state.", "adapter", "state")
        for state, counts in (("running", running), ("waiting", waiting)):
            for label, count in counts.items():
                sequences.add_metric([label, state], count)
        yield sequences


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"loraplex_{name}", text, labels=labels)
