"""The metrics that an endpoint picker of the Gateway API Inference Extension reads, under the names it looks for.

They are those of its model-server protocol (docs/proposals/003-model-server-protocol in
https://github.com/kubernetes-sigs/gateway-api-inference-extension), which are vLLM's. All replicas count as one.
"""

import time
from collections.abc import Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from loraplex_router.telemetry.state import Snapshot
from loraplex_router.vocabulary.adapter import Adapter


class GatewayNames(Snapshot):
    def read(self) -> Iterator[Metric]:
        replicas = self.replicas.values()
        blocks = sum(replica.blocks.num_blocks for replica in replicas)
        used = sum(replica.blocks.used for replica in replicas)
        waiting = sum(replica.scheduler.num_waiting for replica in replicas)
        running = sum(replica.scheduler.num_running for replica in replicas)
        yield GaugeMetricFamily("vllm:num_requests_waiting", "Sequences that wait.", waiting)
        yield GaugeMetricFamily("vllm:num_requests_running", "Sequences that run.", running)
        yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "KV cache in use, from 0 to 1.", used / max(1, blocks))
        config = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=["block_size", "num_gpu_blocks"])
        for size in {replica.scheduler.block_size for replica in replicas}:
            config.add_metric([str(size), str(blocks)], 1)
        yield config
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        adapters = GaugeMetricFamily("vllm:lora_requests_info", "Adapters; the value is the time.", labels=labels)
        staged = [adapter for replica in replicas for adapter in replica.pool]
        ready = _names(adapter for adapter in staged if adapter.ready)
        queued = _names(adapter for adapter in staged if adapter.waiting and not adapter.ready)
        adapters.add_metric([str(sum(replica.pool.slots for replica in replicas)), ready, queued], time.time())
        yield adapters


def _names(adapters: Iterable[Adapter]) -> str:
    """Separated by commas, which only the names of merged adapters have, and those no router asks for by name."""
    names = {name for adapter in adapters for name in adapter.names}
    return ",".join(sorted(name for name in names if "," not in name and name.isprintable()))
