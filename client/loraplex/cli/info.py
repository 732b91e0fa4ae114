"""`loraplex info`: the model that the server runs."""

from dataclasses import asdict

import typer

from loraplex.cli.connection import DEFAULT_SERVER, ApiKey, Json, Server, connected
from loraplex.cli.output import as_json


def info(json: Json = False, server: Server = DEFAULT_SERVER, api_key: ApiKey = None) -> None:
    """Show the server's model and its limits."""
    with connected(server, api_key) as client:
        model = asdict(client.info())
    if json:
        typer.echo(as_json(model))
    else:
        longest = max(map(len, model))
        typer.echo("\n".join(f"{name:<{longest}}  {_text(value)}" for name, value in model.items()))


def _text(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_text(part)}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
