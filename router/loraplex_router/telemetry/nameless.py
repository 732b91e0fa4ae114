"""The metrics for those who may not know which adapters and tenants there are."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from loraplex_router.vocabulary.adapter import BASE_NAME, OTHER

# What stands for a name in each label that has names.
STAND_INS = {"adapter": OTHER, "tenant": OTHER, "running_lora_adapters": "", "waiting_lora_adapters": ""}


@dataclass(frozen=True, slots=True)
class Nameless(Collector):
    """A registry's metrics, those of all adapters and tenants added up."""

    registry: CollectorRegistry

    def collect(self) -> Iterator[Metric]:
        for metric in self.registry.collect():
            yield _without_names(metric)


def _without_names(metric: Metric) -> Metric:
    added = dict[tuple[str, tuple[tuple[str, str], ...]], float]()
    for sample in metric.samples:
        key = sample.name, tuple(_hidden(*label) for label in sample.labels.items())
        if sample.name.endswith("_created"):  # a time: that of the first
            added[key] = min(added.get(key, sample.value), sample.value)
        else:
            added[key] = added.get(key, 0.0) + sample.value
    hidden = Metric(metric.name, metric.documentation, metric.type)
    hidden.samples = [Sample(name, dict(labels), value) for (name, labels), value in added.items()]
    return hidden


def _hidden(label: str, value: str) -> tuple[str, str]:
    return label, value if value == BASE_NAME else STAND_INS.get(label, value)
