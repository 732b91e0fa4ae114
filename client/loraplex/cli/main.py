"""The `loraplex` command: talks to a server, or is one."""

import typer

from loraplex.cli import adapters, kernels, services
from loraplex.cli.chat import chat
from loraplex.cli.generate import generate
from loraplex.cli.info import info
from loraplex.cli.top import top

app = typer.Typer(
    name="loraplex",
    help="One base language model, and any number of LoRA adapters on it. Begin with `loraplex serve`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(chat)
app.command()(info)
app.command()(top)
app.add_typer(adapters.app, name="adapters")
app.add_typer(kernels.app, name="kernels", rich_help_panel="Services")
services.add_commands(app)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
