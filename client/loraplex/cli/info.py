"""`loraplex info`: the model that the server runs."""

from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loraplex.cli.connection import DEFAULT_SERVER, ApiKey, Server, connected


def info(server: Server = DEFAULT_SERVER, api_key: ApiKey = None) -> None:
    """Show the model that the server runs, and how."""
    with connected(server, api_key) as client:
        model = client.info()
    table = Table(box=None, show_header=False)
    for name, value in asdict(model).items():
        table.add_row(name, escape(str(value)))
    Console().print(table)
