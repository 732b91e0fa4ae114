"""`python -m bench.engine`: prints each figure as soon as it is measured. Nothing else should run at the same time."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.engine.figure import Figure
from bench.engine.figures import in_process
from bench.engine.plot import draw


def engine(
    with_servers: Annotated[bool, typer.Option("--served/--in-process", help="Also measure with real servers.")] = True,
    output: Annotated[Path, typer.Option("--json", help="JSON file to write the figures to.")] = Path("engine.json"),
    plot: Annotated[Path, typer.Option(help="Image file for a plot of tokens per second.")] = Path("engine.svg"),
) -> None:
    """Measure the engine on this machine, and compare each figure with its target."""
    console = Console()
    figures = []
    for figure in chain(in_process(), _served() if with_servers else ()):
        figures.append(figure)
        mark = "[green]" if figure.measured >= figure.wanted else "[yellow]"
        console.print(
            f"{figure.name:75} {figure.wanted:6.2f}  {mark}{figure.measured:6.2f}[/]  {figure.detail}", soft_wrap=True
        )
    draw(plot)
    output.write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n")


def _served() -> Iterator[Figure]:
    from bench.engine.served import served

    return served()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(engine)

if __name__ == "__main__":
    app()
