"""A rank's metrics, directly and over HTTP."""

import urllib.request
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.observation.metrics import ShardMetrics
from loraplex_shard.settings import ShardSettings


@pytest.fixture
def metrics() -> ShardMetrics:
    made = ShardMetrics()
    made.describe(pb.GetInfoResponse(model_id="org/model", rank=1, num_blocks=7, memory=pb.DeviceMemory(cache=9 << 30)))
    made.watch_adapters(lambda: {"disk": 3, "host": 2, "device": 1}, lambda: {"host": 4096, "device": 2048})
    return made


def reader(registry: CollectorRegistry) -> Callable[..., float | None]:
    return lambda name, **labels: registry.get_sample_value(f"loraplex_shard_{name}", labels)


def test_steps_loads_and_evictions_are_counted(metrics: ShardMetrics):
    response = pb.StepResponse(duration_us=30_000, failed_chunks=[1])
    metrics.step(pb.StepRequest(lengths=[5, 1]), response)
    with metrics.loading("host"):
        pass
    with pytest.raises(AdapterInvalidError), metrics.loading("host"):
        raise AdapterInvalidError("broken")
    metrics.evicted("device")
    value = reader(metrics.registry)
    assert value("step_duration_seconds_sum") == pytest.approx(0.03)
    assert value("step_tokens_sum") == 6
    assert value("failed_chunks_total") == 1
    assert value("adapter_load_seconds_count", tier="host") == 1
    assert value("adapter_load_failures_total", tier="host", error=AdapterInvalidError.error_type) == 1
    assert value("adapter_evictions_total", tier="device") == 1


def test_a_scrape_shows_the_current_state(metrics: ShardMetrics):
    port = metrics.serve("127.0.0.1", 0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        text = response.read().decode()
    assert 'loraplex_shard_adapters{tier="disk"} 3.0' in text
    assert "loraplex_shard_adapter_host_bytes 4096.0" in text
    assert "loraplex_shard_adapter_device_bytes 2048.0" in text
    assert 'loraplex_shard_memory_bytes{part="cache"} 9.663676416e+09' in text
    assert 'model="org/model",rank="1"' in text
    assert "process_resident_memory_bytes" in text


@pytest.mark.parametrize(
    ("listen", "host"), [("unix:/tmp/s", "127.0.0.1"), ("0.0.0.0:50060", "0.0.0.0"), ("[::1]:50060", "::1")]
)
def test_metrics_are_served_on_the_host_that_the_shard_listens_on(listen: str, host: str):
    assert ShardSettings(listen=listen).metrics_host == host
