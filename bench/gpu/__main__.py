"""`python -m bench.gpu check|speed|profile|all`: prints a line for each check, and the tables at the end."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from bench.gpu import report
from bench.gpu.check import DeviceName, Result
from bench.gpu.isolation import run_section

What = Literal["check", "speed", "profile", "all"]


def gpu(
    what: Annotated[What, typer.Argument(help="What to run: what is right, how fast it is, where time goes.")] = "all",
    device: Annotated[DeviceName, typer.Option(help="cpu: tiny, with the kernels in Triton's interpreter.")] = "cuda",
    output: Annotated[
        Path, typer.Option("--json", help="JSON file to write everything to; a trace goes beside it.")
    ] = Path("gpu.json"),
    minutes: Annotated[float, typer.Option(help="When to end, whatever has not been checked by then.")] = 9.0,
) -> None:
    """Check and measure the shard on one GPU. The exit status is 1 if a check failed."""
    began = time.monotonic()
    os.environ["TRITON_INTERPRET"] = str(int(device == "cpu"))  # before anything imports Triton
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = (
        "1"  # whether there is a GPU is found out without using it, as forks need
    )
    # The libraries are imported once, by the process that all others are forked from.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.gpu.sections"])
    from bench.gpu.sections import sections

    chosen = [section for section in sections(output.parent.resolve()) if what in ("all", section.kind)]
    scale = minutes * 60 / sum(section.seconds for section in chosen)
    results: list[Result] = []
    deadline = began
    for section in chosen:
        deadline += section.seconds * scale  # what a section does not need is the next one's
        for result in run_section(section, device, context, deadline):
            results.append(result)
            print(report.line(result), flush=True)
            report.write(output, device, time.monotonic() - began, results)
    print(report.tables(results))
    print(f"\n{report.summary(results)}\n{time.monotonic() - began:.0f} s; everything is in {output}")
    raise typer.Exit(any(result.status == "FAIL" for result in results))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(gpu)

if __name__ == "__main__":
    app()
