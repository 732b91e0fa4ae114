"""Writes the Grafana dashboards of charts/loraplex/dashboards.

    python -m charts.dashboards

A dashboard is a list of rows; a row is a title and its panels, side by side. Panels use only a few of Grafana's fields;
the tests check every query against the exported metrics.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "loraplex" / "dashboards"
WIDTH, HEIGHT = 24, 8  # of a row, in Grafana's units
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Panel:
    """A graph of (query, legend) pairs over time. `JOB` in a query stands for the selected servers."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def quantiles(metric: str, by: str = "") -> tuple[tuple[str, str], ...]:
    """The median and the 99th percentile of a histogram; with the label `by`, only the latter, per value of the
    label."""
    if by:
        return ((f"histogram_quantile(0.99, sum by (le, {by}) (rate({metric}_bucket{{JOB}}[5m])))", f"{{{{{by}}}}}"),)
    return tuple(
        (f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket{{JOB}}[5m])))", f"p{q * 100:.0f}")
        for q in (0.5, 0.99)
    )


def rate(metric: str, *by: str, selector: str = "JOB") -> str:
    grouping = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouping} (rate({metric}{{{selector}}}[5m]))"


def mean(metric: str, *by: str) -> str:
    return f"{rate(f'{metric}_sum', *by)} / {rate(f'{metric}_count', *by)}"


SERVICE = (
    Row(
        "Requests",
        (
            Panel("Requests", "reqps", ((rate("loraplex_requests_total", "outcome"), "{{outcome}}"),), stacked=True),
            Panel(
                "Sequences",
                "short",
                (
                    ("sum by (state) (loraplex_sequences{JOB})", "{{state}}"),
                    ("sum(loraplex_replicas{JOB})", "replicas"),
                ),
            ),
            Panel("Time to first token", "s", quantiles("loraplex_time_to_first_token_seconds")),
            Panel("Between tokens", "s", quantiles("loraplex_inter_token_seconds")),
        ),
    ),
    Row(
        "Tokens",
        (
            Panel(
                "Tokens",
                "short",
                (
                    (rate("loraplex_generated_tokens_total"), "generated"),
                    (rate("loraplex_step_tokens_total", selector='phase="prefill", JOB'), "prefilled"),
                    (rate("loraplex_prefix_hit_tokens_total"), "found in the prefix cache"),
                ),
            ),
            Panel(
                "Prefix hits",
                "percentunit",
                (
                    (
                        f"{rate('loraplex_prefix_hit_tokens_total')} / {rate('loraplex_prompt_tokens_total')}",
                        "of prompt tokens",
                    ),
                ),
            ),
            Panel("Request duration", "s", quantiles("loraplex_request_duration_seconds")),
            Panel("Queue wait", "s", quantiles("loraplex_queue_wait_seconds")),
        ),
    ),
    Row(
        "Engine",
        (
            Panel(
                "KV cache",
                "short",
                (("sum by (state) (loraplex_kv_blocks{JOB})", "{{state}}"),),
                stacked=True,
            ),
            Panel("Preemptions", "short", ((rate("loraplex_preemptions_total", "replica"), "{{replica}}"),)),
            Panel("Step duration", "s", quantiles("loraplex_step_duration_seconds", by="replica")),
            Panel(
                "Batch",
                "short",
                (
                    (mean("loraplex_step_sequences", "replica"), "sequences, {{replica}}"),
                    (mean("loraplex_step_adapters", "replica"), "adapters, {{replica}}"),
                ),
            ),
        ),
    ),
    Row(
        "Processes",
        (
            Panel(
                "Router time per step",
                "s",
                ((mean("loraplex_router_step_seconds", "replica", "phase"), "{{phase}}, {{replica}}"),),
            ),
            Panel("Rank latency, p99", "s", quantiles("loraplex_rank_latency_seconds", by="rank")),
            Panel("Memory", "bytes", (("process_resident_memory_bytes{JOB}", "{{instance}}"),)),
            Panel("CPU", "short", (("rate(process_cpu_seconds_total{JOB}[5m])", "{{instance}}"),)),
        ),
    ),
)

ADAPTERS = (
    Row(
        "Demand",
        (
            Panel("Requests", "reqps", ((rate("loraplex_requests_total", "adapter"), "{{adapter}}"),), stacked=True),
            Panel(
                "Tokens of ended requests",
                "short",
                ((rate("loraplex_adapter_generated_tokens_total", "adapter"), "{{adapter}}"),),
                stacked=True,
            ),
            Panel(
                "Prompt tokens of ended requests",
                "short",
                ((rate("loraplex_adapter_prompt_tokens_total", "adapter"), "{{adapter}}"),),
                stacked=True,
            ),
            Panel(
                "Unfinished requests",
                "reqps",
                (
                    (
                        rate("loraplex_requests_total", "adapter", "outcome", selector='outcome!="finished", JOB'),
                        "{{adapter}}: {{outcome}}",
                    ),
                ),
            ),
        ),
    ),
    Row(
        "Queues",
        (
            Panel(
                "Waiting",
                "short",
                (('sum by (adapter) (loraplex_adapter_sequences{state="waiting", JOB})', "{{adapter}}"),),
            ),
            Panel(
                "Running",
                "short",
                (('sum by (adapter) (loraplex_adapter_sequences{state="running", JOB})', "{{adapter}}"),),
                stacked=True,
            ),
            Panel("Queue wait, p99", "s", quantiles("loraplex_queue_wait_seconds", by="adapter")),
        ),
    ),
    Row(
        "Tiers",
        (
            Panel(
                "Adapters by tier",
                "short",
                (
                    ("sum by (tier) (loraplex_adapters{JOB})", "{{tier}}"),
                    ("sum(loraplex_adapter_slots{JOB})", "slots"),
                ),
            ),
            Panel("Loads", "ops", ((rate("loraplex_adapter_load_seconds_count", "tier"), "{{tier}}"),)),
            Panel("Load time, p99", "s", quantiles("loraplex_adapter_load_seconds", by="tier")),
            Panel(
                "Evictions and failed loads",
                "ops",
                (
                    (rate("loraplex_adapter_evictions_total", "tier"), "evicted from {{tier}}"),
                    (rate("loraplex_adapter_load_failures_total", "tier", "error"), "{{tier}}: {{error}}"),
                ),
            ),
        ),
    ),
    Row(
        "Shards",
        (
            Panel("Adapters by tier", "short", (("sum by (tier) (loraplex_shard_adapters{JOB})", "{{tier}}"),)),
            Panel(
                "Memory of adapters",
                "bytes",
                (
                    ("loraplex_shard_adapter_host_bytes{JOB}", "{{instance}}, host"),
                    ("loraplex_shard_adapter_device_bytes{JOB}", "{{instance}}, device"),
                ),
            ),
            Panel("Load time, p99", "s", quantiles("loraplex_shard_adapter_load_seconds", by="tier")),
            Panel("Step duration, p99", "s", quantiles("loraplex_shard_step_duration_seconds", by="instance")),
        ),
    ),
)

DASHBOARDS = {
    "service": ("loraplex: service", SERVICE),
    "adapters": ("loraplex: adapters", ADAPTERS),
}


def write(name: str) -> str:
    """A dashboard's file."""
    title, rows = DASHBOARDS[name]
    dashboard = {
        "uid": f"loraplex-{name}",
        "title": title,
        "tags": ["loraplex"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_DATASOURCE_VARIABLE, _JOB_VARIABLE]},
        "panels": list(_panels(rows)),
    }
    return json.dumps(dashboard, indent=2) + "\n"


_DATASOURCE_VARIABLE = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
_JOB_VARIABLE = {
    "name": "job",
    "label": "Job",
    "type": "query",
    "datasource": DATASOURCE,
    "query": {"query": 'label_values({__name__=~"loraplex_(shard_)?build_info"}, job)', "refId": "job"},
    "refresh": 2,
    "includeAll": True,
    "multi": True,
    "current": {"text": "All", "value": "$__all"},
}


def _panels(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    number = 0
    for place, row in enumerate(rows):
        top = place * (HEIGHT + 1)
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1},
        }
        width = WIDTH // len(row.panels)
        for column, panel in enumerate(row.panels):
            number += 1
            position = {"x": column * width, "y": top + 1, "w": width, "h": HEIGHT}
            yield {"id": number, "gridPos": position, **_graph(panel)}


def _graph(panel: Panel) -> dict[str, Any]:
    custom = {"fillOpacity": 20, "stacking": {"mode": "normal"}} if panel.stacked else {"fillOpacity": 0}
    return {
        "type": "timeseries",
        "title": panel.title,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query.replace("JOB", 'job=~"$job"'), "legendFormat": legend}
            for i, (query, legend) in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(write(name))
