"""`loraplex kernels`: the compiled CPU kernels. Needs the shard's packages, not a model."""

from pathlib import Path
from typing import Annotated

import typer

from loraplex_protos.errors import LoraplexError

app = typer.Typer(help="Compile the CPU kernels.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def kernels() -> None:
    """Without a callback, typer would merge the only command into its parent."""


@app.command()
def build(
    directory: Annotated[
        Path | None, typer.Option(help="Output directory, for a shard's --kernels. Default: the user's cache.")
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Compile for every processor that the compiler supports, as for a portable image."),
    ] = False,
) -> None:
    """Compile the kernels now, unless they exist. A shard without kernels compiles them when it starts."""
    try:
        from loraplex_shard.kernels import library
    except ModuleNotFoundError as error:
        typer.echo(f"error: {error.name} is not installed: pip install 'loraplex[shard]'", err=True)
        raise typer.Exit(1) from None
    try:
        for name in library.INSTRUCTION_SETS if every else library.instruction_sets():
            if not library.compiles(name):
                typer.echo(f"no kernels for {name}: the compiler does not support it", err=True)
                continue
            typer.echo(library.build(directory, name))
            if not every:
                break  # the first are the best for this processor; a shard uses them too
    except LoraplexError as error:
        typer.echo(f"error: {error.message}", err=True)
        raise typer.Exit(1) from None
