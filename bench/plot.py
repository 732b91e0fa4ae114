"""Draws a measurement."""

from pathlib import Path

from matplotlib.figure import Figure

from bench.load import Workload
from bench.report import Results, summarize


def write_plot(path: Path, workload: Workload, results: Results) -> None:
    """Throughput as bars with a dot per run; both latencies as cumulative distributions."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    throughput, first_token, gap = figure.subplots(1, 3)
    for place, (target, runs) in enumerate(results.items()):
        color = f"C{place}"
        throughput.bar(place, summarize(runs).output_tokens_per_second, color=color, alpha=0.5, label=target)
        throughput.scatter([place] * len(runs), [run.tokens_per_second for run in runs], color=color)
        first_token.ecdf([1000 * value for run in runs for value in run.first_tokens], color=color)
        gap.ecdf([1000 * value for run in runs for value in run.gaps], color=color)
    throughput.set(title="output tokens per second", xticks=[])
    figure.legend(loc="outside lower center", ncols=2)
    first_token.set(title="time to first token", xlabel="ms", ylabel="share of requests", xlim=0)
    gap.set(title="time between tokens", xlabel="ms", ylabel="share of tokens", xlim=0)
    figure.suptitle(
        f"{workload.concurrency} at once, {workload.prompt_tokens} tokens in, {workload.output_tokens} out, "
        f"adapters: {len(workload.adapters)}"
    )
    figure.savefig(path, dpi=120)
