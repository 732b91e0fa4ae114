"""The `loraplex` command: it talks to a server, or runs one."""

from importlib.metadata import version as version_of
from typing import Annotated

import typer

from loraplex.cli import adapters, kernels, services
from loraplex.cli.batch import batch
from loraplex.cli.chat import chat
from loraplex.cli.generate import generate
from loraplex.cli.info import info
from loraplex.cli.output import print_whatever_the_encoding
from loraplex.cli.top import top
from loraplex_command.interrupts import raise_at_interrupts


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"loraplex {version_of('loraplex')}")
        raise typer.Exit()


app = typer.Typer(
    name="loraplex",
    help="One base language model, and any number of LoRA adapters on it. Begin with `loraplex serve`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's tables cut off names if the terminal is narrow
)


@app.callback()
def loraplex(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The options that come before the command. Services undo what this does."""
    raise_at_interrupts()


app.command()(generate)
app.command()(chat)
app.command()(batch)
app.command()(info)
app.command()(top)
app.add_typer(adapters.app, name="adapters")
app.add_typer(kernels.app, name="kernels", rich_help_panel="Services")
services.add_commands(app)


def main() -> None:
    print_whatever_the_encoding()
    app()


if __name__ == "__main__":
    main()
