"""`loraplex adapters`: what the server has, loaded ahead of its use, or unloaded."""

from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from loraplex.cli.connection import DEFAULT_SERVER, ApiKey, Server, connected

app = typer.Typer(no_args_is_help=True, help="List, load and unload adapters.")

Id = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER", help="A name in the server's adapter directory, or a hub repository such as org/name."
    ),
]
Source = Annotated[
    str, typer.Option(help="local or hub. Default: local if the directory has that name, else hub.", show_default=False)
]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of a hub repository.", show_default=False)]
Token = Annotated[
    str, typer.Option(envvar="HF_TOKEN", help="Passed to the hub for a private repository.", show_default=False)
]


@app.command("list")
def list_adapters(server: Server = DEFAULT_SERVER, api_key: ApiKey = None) -> None:
    """Show the adapters that are loaded, and those in the server's adapter directory."""
    with connected(server, api_key) as client:
        adapters = client.adapters()
    if not adapters:
        typer.echo("No adapters. Start the server with --adapters DIR, or load one from the hub.")
        return
    table = Table("adapter", "source", "revision", "tier", box=None, header_style="bold")
    for heading in ("lora_rank", "size", "running", "waiting"):
        table.add_column(heading, justify="right")
    for adapter in adapters:
        table.add_row(
            escape(adapter.id),
            adapter.source,
            escape(adapter.revision[:12]),
            adapter.tier or "fetching",
            str(adapter.lora_rank or ""),
            decimal(adapter.size_bytes) if adapter.size_bytes else "",
            str(adapter.running_sequences),
            str(adapter.waiting_sequences),
        )
    Console().print(table)


@app.command("load")
def load_adapter(
    id: Id,
    source: Source = "",
    revision: Revision = "",
    token: Token = "",
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Fetch and check an adapter before its first request needs it; if it is loaded already, read it again."""
    with connected(server, api_key) as client, Console(stderr=True).status(f"Loading {escape(id)}"):
        adapter = client.load_adapter(id, source=source, revision=revision, token=token)
    typer.echo(f"Loaded {adapter.id}: lora_rank {adapter.lora_rank}, {decimal(adapter.size_bytes)}, {adapter.digest}")


@app.command("unload")
def unload_adapter(
    id: Id, source: Source = "", revision: Revision = "", server: Server = DEFAULT_SERVER, api_key: ApiKey = None
) -> None:
    """Free what an adapter holds on the device and in host memory."""
    with connected(server, api_key) as client:
        client.unload_adapter(id, source=source, revision=revision)
    typer.echo(f"Unloaded {id}")
