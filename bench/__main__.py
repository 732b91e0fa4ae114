"""`python -m bench TARGET [TARGET]`: measures one target, or two in turn."""

import asyncio
from contextlib import AsyncExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.load import LoadError, Run, Target, Workload, measure
from bench.report import table, write_json
from bench.targets import open_target
from loraplex import LoraplexError

INSTALL = ".venv/bin/pip install --constraint constraints.txt --editable '.[bench]'"


def bench(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...", help="One or two of grpc://HOST:PORT, openai+http://HOST:PORT/v1, peft:DIRECTORY."
        ),
    ],
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Concurrent requests.")] = 8,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", "-p", min=1, help="Tokens in each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option("--output-tokens", "-n", min=2, help="Tokens in each answer.")] = 64,
    num_adapters: Annotated[
        int | None,
        typer.Option(
            "--num-adapters", "-k", min=0, help="How many of the first target's adapters to use. 0: the base model."
        ),
    ] = None,
    adapters: Annotated[str, typer.Option(help="The adapters' names instead of their number: a,b,c.")] = "",
    requests: Annotated[int | None, typer.Option(min=1, help="Requests per run. Default: 4 times -c.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs per target, alternating; medians are reported.")] = 3,
    adapter_dir: Annotated[Path | None, typer.Option(help="Directory of adapters for peft:.")] = None,
    vocab_size: Annotated[int, typer.Option(min=1, help="Prompts are random token ids below this.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    json: Annotated[Path | None, typer.Option(help="JSON file to write all measurements to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Image file to draw a plot to; needs matplotlib.")] = None,
) -> None:
    """Measure TARGETs: output tokens per second, time to the first token, time between tokens."""
    if len(targets) > 2 or len(set(targets)) < len(targets):
        raise typer.BadParameter("give one target, or two different ones", param_hint="TARGET")
    if plot and find_spec("matplotlib") is None:  # before anything is measured
        raise typer.BadParameter(f"needs matplotlib: {INSTALL}", param_hint="--plot")
    if any(target.startswith("peft:") for target in targets) and find_spec("peft") is None:
        raise typer.BadParameter(f"peft: needs PEFT: {INSTALL}", param_hint="TARGET")

    async def main() -> tuple[Workload, dict[str, list[Run]]]:
        async with AsyncExitStack() as stack:
            opened = {name: open_target(name, adapter_dir) for name in targets}
            for target in opened.values():
                stack.push_async_callback(target.close)
            names = await choose_adapters(opened[targets[0]], adapters, num_adapters)
            workload = Workload(
                concurrency, requests or 4 * concurrency, prompt_tokens, output_tokens, names, vocab_size, seed
            )
            return workload, await compare(opened, workload, runs)

    try:
        workload, results = asyncio.run(main())
    except (LoadError, LoraplexError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    Console().print(table(results))
    if json:
        write_json(json, workload, results)
    if plot:
        from bench.plot import write_plot

        write_plot(plot, workload, results)


async def choose_adapters(target: Target, names: str, count: int | None) -> tuple[str, ...]:
    """The first `count` of `names`, or of the target's adapters if no names are given. Without a count: all of `names`,
    or none, for the base model."""
    chosen = tuple(names.split(",")) if names else tuple(await target.adapters()) if count else ()
    if count is not None and len(chosen) < count:
        raise LoadError(f"-k {count}: there are only {len(chosen)} adapters")
    return chosen[:count]


async def compare(targets: dict[str, Target], workload: Workload, runs: int) -> dict[str, list[Run]]:
    """Runs the targets in turn, so that other load on the machine affects both."""
    results: dict[str, list[Run]] = {name: [] for name in targets}
    for number in range(runs):
        for name, target in targets.items():
            results[name].append(await measure(target, workload, number))
            typer.echo(f"run {number + 1}/{runs} {name}: {results[name][-1].tokens_per_second:.1f} tok/s", err=True)
    return results


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(bench)

if __name__ == "__main__":
    app()
