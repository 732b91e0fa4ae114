"""A real Prometheus scrapes a real router and its shard under load, and answers the dashboards' queries."""

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loraplex import Client
from tests.e2e.processes import Server, free_port, run
from tests.e2e.tiny import save_adapter, save_model
from tests.operate.test_dashboards import RULES, queries
from tests.tools import needs_prometheus, needs_promtool

pytestmark = [needs_prometheus, needs_promtool]

REQUESTS, TOKENS = 24, 30
# Queries with these have no results here.
EMPTY = "failures", "evictions", "outcome!=", "absent", " == 0", " > "


class Prometheus:
    """A Prometheus that scrapes each second, and evaluates the chart's rules."""

    def __init__(self, folder: Path, *targets: str) -> None:
        scrape = {"job_name": "loraplex", "scrape_interval": "1s", "static_configs": [{"targets": targets}]}
        config = {"rule_files": [str(RULES)], "scrape_configs": [scrape], "global": {"evaluation_interval": "1s"}}
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is also YAML
        self.url = f"http://127.0.0.1:{free_port()}"
        flags = (f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data", "--log.level=error")
        self.process = subprocess.Popen(["prometheus", *flags, f"--web.listen-address={self.url[7:]}"])

    def ask(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as response:
            answer = json.load(response)
        assert answer["status"] == "success"
        return answer["data"]

    def value(self, query: str) -> float:
        """The sum of a query's results."""
        return sum(float(sample["value"][1]) for sample in self.ask("query", query=query)["result"])

    def wait_until(self, query: str, value: float, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if (now := self.value(query)) == value:
                    return
            except OSError:  # it does not listen yet
                now = -1.0
            assert time.monotonic() < deadline, f"{query} is {now}, not {value}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, int]]:
    """A server, and the port of its shard's metrics."""
    model = save_model(tmp_path_factory.mktemp("model"))
    adapters = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("sql", "sentiment")):
        save_adapter(model, adapters / name, 4, seed)
    port = free_port()
    flags = (f"--adapters={adapters}", "--kv-blocks=256", "--threads=1", "--log-format=json", "--lorax-metrics")
    with Server(str(model), *flags, "--metrics-adapters=2", env={"LORAPLEX_METRICS_PORT": str(port)}) as running:
        yield running, port


@pytest.fixture(scope="module")
def prometheus(server: tuple[Server, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has scraped the server before, during and after its work."""
    router, shard_port = server
    made = Prometheus(tmp_path_factory.mktemp("prometheus"), router.url[7:], f"127.0.0.1:{shard_port}")
    try:
        made.wait_until("sum(up)", 2)
        with Client(router.address) as client, ThreadPoolExecutor(8) as pool:
            names = (None, "sql", "sentiment")

            def work(number: int) -> None:
                client.generate(f"{number}", adapter=names[number % 3], max_new_tokens=TOKENS, ignore_eos=True)

            list(pool.map(work, range(REQUESTS)))
        made.wait_until('sum(loraplex_requests_total{outcome="finished"})', REQUESTS)
        made.wait_until("count(rate(loraplex_adapter_generated_tokens_total[5m]))", 3)  # base, other, one adapter
        made.wait_until('count(rate(loraplex_shard_adapter_load_seconds_count{tier="device"}[5m]))', 1)
        yield made
    finally:
        made.process.terminate()
        made.process.wait(30)


def test_prometheus_has_the_requests_and_tokens_by_adapter(prometheus: Prometheus):
    assert prometheus.value('loraplex_requests_total{adapter="[base]"}') == REQUESTS / 3
    assert prometheus.value("sum(loraplex_requests_total)") == REQUESTS
    assert prometheus.value('loraplex_requests_total{adapter="[other]"}') == REQUESTS / 3  # two have their own series
    assert prometheus.value("loraplex_generated_tokens_total") >= REQUESTS * TOKENS
    assert prometheus.value("sum(loraplex_adapter_generated_tokens_total)") == REQUESTS * TOKENS
    assert prometheus.value("lorax_request_count") == REQUESTS


def test_prometheus_has_the_routers_and_the_shards_metrics_of_the_same_steps(prometheus: Prometheus):
    steps = prometheus.value("loraplex_step_duration_seconds_count")
    prometheus.wait_until("loraplex_shard_step_duration_seconds_count", steps)
    computed = prometheus.value("sum(loraplex_step_tokens_total)")
    assert computed == prometheus.value("loraplex_shard_step_tokens_sum")
    assert prometheus.value('loraplex_shard_adapters{tier="device"}') == 2
    assert prometheus.value('loraplex_adapters{tier="device"}') == 2
    assert prometheus.value('loraplex_adapter_load_seconds_count{tier="host"}') == 2
    assert prometheus.value('loraplex_adapter_load_seconds_count{tier="device"}') == 2
    assert prometheus.value('loraplex_rank_latency_seconds_count{rank="0"}') == steps


@pytest.mark.parametrize("query", sorted(set(queries())))
def test_a_dashboards_queries_have_results(prometheus: Prometheus, query: str):
    found = prometheus.ask("query", query=query.replace("$job", "loraplex"))["result"]
    assert found or any(word in query for word in EMPTY)


def test_the_rules_are_healthy_and_nothing_fires(prometheus: Prometheus):
    groups = prometheus.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert rules and {rule["health"] for rule in rules} == {"ok"}
    assert {rule["name"] for rule in rules if rule["state"] == "firing"} == set()


def test_promtool_finds_no_problems(server: tuple[Server, int], prometheus: Prometheus):
    router, shard_port = server
    for url in (router.url, f"http://127.0.0.1:{shard_port}"):
        with urllib.request.urlopen(f"{url}/metrics") as response:
            lines = response.read().decode().splitlines(keepends=True)
        own = "".join(line for line in lines if "lorax_" not in line)  # LoRAX's names cannot be changed
        done = subprocess.run(["promtool", "check", "metrics"], input=own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_top_shows_the_server(server: tuple[Server, int], prometheus: Prometheus):
    router, _ = server
    done = run("top", "--once", "--interval", "0.2", "--url", router.url)
    assert done.returncode == 0, done.stderr
    for text in ("running 0", "2/64", "[base]"):
        assert text in done.stdout
    # Two rows have names: the base, and the adapter that was requested first.
    assert ("sql" in done.stdout) != ("sentiment" in done.stdout)


def test_each_request_has_a_line_of_json(server: tuple[Server, int], prometheus: Prometheus):
    router, _ = server
    lines = [json.loads(line) for line in router.log.splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["message"] == "request"]
    assert len(requests) == REQUESTS
    assert {line["adapter"] for line in requests} == {"[base]", "sql", "sentiment"}
    assert all(line["generated_tokens"] == TOKENS and "prompt" not in line for line in requests)
    assert sum(line["message"] == "adapter staged" for line in lines) == 2
