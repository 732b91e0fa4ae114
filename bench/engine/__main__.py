"""`python -m bench.engine`: prints each figure as soon as it is measured. Nothing else should run meanwhile."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.engine.figures import Figure, in_process
from bench.engine.plot import draw


def engine(
    with_servers: Annotated[bool, typer.Option("--served/--in-process", help="Also what needs servers.")] = True,
    output: Annotated[Path, typer.Option("--json", help="Where to write the figures.")] = Path("engine.json"),
    plot: Annotated[Path, typer.Option(help="Where to draw tokens per second over concurrency.")] = Path("engine.svg"),
) -> None:
    """Measure what the engine reaches here, beside what is wanted of it."""
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
