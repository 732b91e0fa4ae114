"""Reports a measurement: a table and a JSON file."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from bench.load import Run, Workload, percentile

Results = Mapping[str, Sequence[Run]]  # target -> its runs


@dataclass(frozen=True, slots=True)
class Summary:
    """Medians over a target's runs; times are in seconds."""

    output_tokens_per_second: float
    ttft_p50: float
    ttft_p95: float
    inter_token_p50: float
    inter_token_p95: float


LABELS = {
    "output_tokens_per_second": "output tok/s",
    "ttft_p50": "TTFT p50, ms",
    "ttft_p95": "TTFT p95, ms",
    "inter_token_p50": "inter-token p50, ms",
    "inter_token_p95": "inter-token p95, ms",
}


def summarize(runs: Sequence[Run]) -> Summary:
    return Summary(
        output_tokens_per_second=statistics.median(run.tokens_per_second for run in runs),
        ttft_p50=statistics.median(percentile(run.first_tokens, 50) for run in runs),
        ttft_p95=statistics.median(percentile(run.first_tokens, 95) for run in runs),
        inter_token_p50=statistics.median(percentile(run.gaps, 50) for run in runs),
        inter_token_p95=statistics.median(percentile(run.gaps, 95) for run in runs),
    )


def ratios(results: Results) -> dict[str, float]:
    """Each figure of the second target divided by the first target's; empty if there is only one target."""
    first, *others = (asdict(summarize(runs)) for runs in results.values())
    return {name: others[0][name] / value for name, value in first.items()} if others else {}


def table(results: Results) -> Table:
    table = Table("", box=None, header_style="bold")
    for target in [*results, *(["second / first"] if len(results) == 2 else [])]:
        table.add_column(target, justify="right")
    summaries = [asdict(summarize(runs)) for runs in results.values()]
    quotients = ratios(results)
    for name, label in LABELS.items():
        scale = 1000 if label.endswith("ms") else 1
        cells = [f"{summary[name] * scale:.1f}" for summary in summaries]
        table.add_row(label, *cells, *([f"{quotients[name]:.2f}"] if quotients else []))
    return table


def write_json(path: Path, workload: Workload, results: Results) -> None:
    content = {
        "workload": asdict(workload),
        "targets": [
            {"target": target, "summary": asdict(summarize(runs)), "runs": [asdict(run) for run in runs]}
            for target, runs in results.items()
        ],
        "ratios": ratios(results),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
