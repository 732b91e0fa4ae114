"""How the client's commands reach a server, and what they say if that fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from loraplex import Client, LoraplexError, UnavailableError

Server = Annotated[
    str,
    typer.Option("--server", envvar="LORAPLEX_SERVER", metavar="HOST:PORT", help="The gRPC address of the server."),
]
DEFAULT_SERVER = "localhost:50051"


@contextmanager
def connected(server: str) -> Iterator[Client]:
    """A client of the server; an error that it raises becomes one line on stderr and exit code 1."""
    try:
        with Client(server) as client:
            yield client
    except LoraplexError as error:
        show_error(error, server)
        raise typer.Exit(1) from None


def show_error(error: LoraplexError, server: str) -> None:
    message = error.message
    if isinstance(error, UnavailableError) and "failed to connect" in message:  # gRPC's words
        message = f"no server answers at {server}. Start one with `loraplex serve`, or name its address with --server."
    typer.echo(f"error: {message}", err=True)
