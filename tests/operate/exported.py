"""The names of all samples that a router and a rank export."""

from collections.abc import Iterable
from types import SimpleNamespace

from prometheus_client.metrics_core import Metric

from loraplex_protos import shard_pb2 as pb
from loraplex_router.engine.blocks import BlockAllocator
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.engine.scheduler import Limits, Scheduler
from loraplex_router.telemetry.request_log import RequestLog
from loraplex_router.telemetry.telemetry import Telemetry
from loraplex_shard.observation.metrics import ShardMetrics

SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}


async def router_names() -> set[str]:
    telemetry = Telemetry(adapters=1, log=RequestLog(prompts=False))
    telemetry.metrics.describe_build("org/model")
    telemetry.metrics.watch_registry(lambda: False)
    telemetry.metrics.watch_store(lambda: False)
    pool, blocks = AdapterPool(1, 1), BlockAllocator(1)
    scheduler = Scheduler(Limits(1, 1, 1), blocks, pool)
    telemetry.watch(SimpleNamespace(name="0", accepting=True, scheduler=scheduler, blocks=blocks, pool=pool))
    await telemetry.scrape()
    return _names(telemetry.registry.collect())


def shard_names() -> set[str]:
    metrics = ShardMetrics()
    metrics.describe(pb.GetInfoResponse(model_id="org/model"))
    metrics.watch_adapters(lambda: {"host": 0}, lambda: {"host": 0, "device": 0})
    return _names(metrics.registry.collect())


def _names(families: Iterable[Metric]) -> set[str]:
    return {f"{family.name}{suffix}" for family in families for suffix in SUFFIXES.get(family.type, ("",))}
