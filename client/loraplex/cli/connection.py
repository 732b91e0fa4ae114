"""How the client's commands reach a server, and their error messages."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from loraplex import Client, LoraplexError, UnauthenticatedError, UnavailableError

Server = Annotated[
    str,
    typer.Option(
        "--server",
        envvar="LORAPLEX_SERVER",
        metavar="HOST:PORT",
        help="The gRPC address of the server; https://HOST:PORT if it speaks TLS.",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="LORAPLEX_API_KEY", help="For a server with API keys."),
]
Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON, for programs.")]
DEFAULT_SERVER = "localhost:50051"


@contextmanager
def connected(server: str, api_key: str | None) -> Iterator[Client]:
    """A client of the server. Its errors become one line on stderr and exit code 1."""
    try:
        client = Client(server, api_key=api_key)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--server") from error
    try:
        with client:
            yield client
    except LoraplexError as error:
        show_error(error)
        raise typer.Exit(1) from None


def show_error(error: LoraplexError) -> None:
    message = error.message
    if isinstance(error, UnavailableError) and "no server answers" in message:
        message += ". Start one with `loraplex serve`, or name its address with --server."
    if isinstance(error, UnauthenticatedError):
        message += ". Give it with --api-key, or as LORAPLEX_API_KEY."
    typer.echo(f"error: {message}", err=True)
