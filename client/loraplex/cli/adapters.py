"""`loraplex adapters`: list, load, upload, pin and unload the server's adapters."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape

from loraplex import Adapter, AdapterState, Classifier
from loraplex.cli.connection import DEFAULT_SERVER, ApiKey, Json, Server, connected
from loraplex.cli.output import as_json, listing, width

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, load, upload, pin and unload adapters.")
HEADINGS = "adapter", "source", "revision", "tier", "lora_rank", "size", "requests", "used", "digest"
UPLOADED = (  # what an adapter is read from, of its folder
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapters.safetensors",
    "config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "additional_chat_templates/*.jinja",
)
NAMED_STATES = (
    AdapterState.FETCHING,
    AdapterState.UNLOADING,
    AdapterState.BROKEN,
    AdapterState.REGISTERED,
    AdapterState.ALIAS,
    AdapterState.FAILED,
)
SHOWN_LABELS = 8
NUMBERS = frozenset({"lora_rank", "size", "requests", "used"})

Id = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER", help="A name in the server's adapter directory, or a hub repository such as org/name."
    ),
]
Name = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="Its name in `loraplex adapters list`.", show_default=False)
]
NewName = Annotated[str, typer.Argument(help="The name that requests will use.")]
Expected = Annotated[
    int | None, typer.Option(min=0, help="The version that the name must have now; 0: none. Default: any.")
]
Digest = Annotated[
    str, typer.Option(help="As shown by `list --digests`, instead of ADAPTER: for merged adapters.", show_default=False)
]
Source = Annotated[
    str, typer.Option(help="Such as local or hub. Default: the server's first source that has it.", show_default=False)
]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of a hub repository.", show_default=False)]
Token = Annotated[
    str, typer.Option(envvar="HF_TOKEN", help="Sent to the hub, for private repositories.", show_default=False)
]


@app.command("list")
def list_adapters(
    digests: Annotated[bool, typer.Option("--digests", help="Show digests in full.")] = False,
    json: Json = False,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Show loaded adapters, and those in the adapter directory."""
    with connected(server, api_key) as client:
        adapters = client.adapters()
    if json:
        typer.echo(as_json([asdict(adapter) for adapter in adapters]))
    elif not adapters:
        typer.echo("No adapters. Start the server with --adapters DIR, or load one from the hub.")
    else:
        rows = [_row(adapter, digests) for adapter in adapters]
        remarks = ["; ".join(_remarks(adapter)) for adapter in adapters]
        typer.echo("\n".join(listing(HEADINGS, rows, width(), NUMBERS, remarks)))


def _row(adapter: Adapter, digests: bool) -> tuple[str, ...]:
    return (
        adapter.id,
        adapter.source,
        adapter.revision[:12],
        _place(adapter),
        str(adapter.lora_rank or ""),
        decimal(adapter.size_bytes) if adapter.size_bytes else "",
        str(adapter.requests),
        _ago(adapter.last_used),
        adapter.digest if digests else adapter.digest[:12],
    )


def _remarks(adapter: Adapter) -> list[str]:
    activated = f"activated by {adapter.invocation!r}" if adapter.invocation else ""
    shares = " or ".join(f"{to} ({percent:g} %)" for to, percent in adapter.targets.items())
    stands = f"stands for {shares}" if shares else ""
    classifies = _described(adapter.classifier) if adapter.classifier else ""
    return [remark for remark in (adapter.reason, stands, activated, classifies, *adapter.warnings) if remark]


def _described(classifier: Classifier) -> str:
    labels = ", ".join(classifier.labels[:SHOWN_LABELS])
    more = len(classifier.labels) - SHOWN_LABELS
    counted = f" and {more:,} more" if more > 0 else ""
    return f"classifies {'tokens' if classifier.of_tokens else 'texts'}: {labels}{counted}"


def _place(adapter: Adapter) -> str:
    """Where the adapter is, and its problems, if any."""
    words = [str(adapter.tier)] if adapter.tier else []
    if adapter.state in NAMED_STATES:
        percent = 100 * (adapter.fetched_bytes or 0) // adapter.total_bytes if adapter.total_bytes else None
        words.append(adapter.state if percent is None else f"{adapter.state} {percent} %")
    if adapter.pinned:
        words.append("pinned")
    if len(adapter.residences) > 1:
        words.append(f"in {len(adapter.residences)} replicas")
    return ", ".join(words)


def _ago(last_used: float | None) -> str:
    if last_used is None:
        return ""
    seconds = max(0, int(time.time() - last_used))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"


@app.command("load")
def load_adapter(
    id: Id,
    source: Source = "",
    revision: Revision = "",
    token: Token = "",
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Fetch and check an adapter before its first request. An adapter that is already loaded is reread."""
    with connected(server, api_key) as client, Console(stderr=True).status(f"Loading {escape(id)}"):
        adapter = client.load_adapter(id, source=source, revision=revision, token=token)
    _report("Loaded", adapter, f"lora_rank {adapter.lora_rank}", decimal(adapter.size_bytes))


@app.command("upload")
def upload_adapter(
    name: NewName,
    folder: Annotated[Path, typer.Argument(help="The adapter's folder, or its GGUF file.", exists=True)],
    expected_version: Expected = None,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Upload an adapter. It is the newest version of its name."""
    # Beside PEFT's files, a GGUF file is what the adapter was converted to.
    patterns = UPLOADED if (folder / UPLOADED[0]).exists() else (*UPLOADED, "*.gguf")
    paths = {path.relative_to(folder).as_posix(): path for pattern in patterns for path in folder.glob(pattern)}
    paths |= {folder.name: folder} if folder.is_file() else {}
    files = {file: path.read_bytes() for file, path in paths.items() if path.is_file()}
    if not any(file == UPLOADED[0] or file.endswith(".gguf") for file in files):
        inside = " or ".join(str(config.parent) for config in sorted(folder.glob(f"*/{UPLOADED[0]}"))[-5:])
        raise typer.BadParameter(
            f"{folder} has no adapter_config.json and no .gguf file" + (inside and f"; did you mean {inside}?"),
            param_hint="folder",
        )
    with connected(server, api_key) as client, Console(stderr=True).status(f"Uploading {escape(name)}"):
        adapter = client.upload_adapter(name, files, expected_version=expected_version)
    _report("Uploaded", adapter, f"lora_rank {adapter.lora_rank}", decimal(adapter.size_bytes))


@app.command("register")
def register_adapter(
    name: NewName,
    id: Id,
    source: Source = "",
    revision: Revision = "",
    token: Token = "",
    expected_version: Expected = None,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Give an adapter a name in the registry file. It is the newest version of that name."""
    with connected(server, api_key) as client, Console(stderr=True).status(f"Loading {escape(id)}"):
        adapter = client.register_adapter(
            name, id, source=source, revision=revision, token=token, expected_version=expected_version
        )
    _report("Registered", adapter)


@app.command("alias")
def set_alias(
    name: Annotated[str, typer.Argument(help="The alias.")],
    targets: Annotated[
        list[str], typer.Argument(help="A name or version that it stands for; of several, each with =PERCENT.")
    ],
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Make a name stand for others. It is in the server's registry file: sql-canary sql@1=95 sql@2=5."""
    try:
        shares = dict(map(_share, targets))
    except ValueError:
        raise typer.BadParameter("write NAME=PERCENT", param_hint="TARGETS") from None
    with connected(server, api_key) as client:
        client.set_alias(name, shares)
    typer.echo(f"{name} stands for {', '.join(targets)}")


def _report(done: str, adapter: Adapter, *facts: str) -> None:
    typer.echo(f"{done} {adapter.id}: {', '.join((*facts, adapter.digest))}")
    for warning in adapter.warnings:
        typer.echo(f"Warning: {warning}", err=True)


def _share(target: str) -> tuple[str, float]:
    name, given, percent = target.partition("=")
    return name, float(percent) if given else 100.0


@app.command("remove")
def remove_adapter(
    name: Name,
    expected_version: Annotated[
        int | None, typer.Option(min=0, help="The version that it must have now. Default: any.")
    ] = None,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Remove a name. It may be of an upload, or in the registry file a name, an alias or an older version."""
    with connected(server, api_key) as client:
        client.remove_adapter(name, expected_version=expected_version)
    typer.echo(f"Removed {name}")


@app.command("unload")
def unload_adapter(
    id: Name = "",
    source: Source = "",
    revision: Revision = "",
    digest: Digest = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait until requests that need it have ended.")] = False,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Free an adapter's memory on the device and on the host."""
    with connected(server, api_key) as client:
        client.unload_adapter(id, source=source, revision=revision, digest=digest, wait=wait)
    typer.echo(f"Unloaded {id or digest}")


@app.command("pin")
def pin_adapter(
    id: Name = "",
    source: Source = "",
    revision: Revision = "",
    token: Token = "",
    digest: Digest = "",
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Keep an adapter on the device until it is unpinned or unloaded."""
    with connected(server, api_key) as client, Console(stderr=True).status(f"Loading {escape(id or digest)}"):
        adapter = client.pin_adapter(id, source=source, revision=revision, token=token, digest=digest)
    typer.echo(f"Pinned {adapter.id}")


@app.command("unpin")
def unpin_adapter(
    id: Name = "",
    source: Source = "",
    revision: Revision = "",
    digest: Digest = "",
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Let an adapter leave the device when others need its slot."""
    with connected(server, api_key) as client:
        adapter = client.unpin_adapter(id, source=source, revision=revision, digest=digest)
    typer.echo(f"Unpinned {adapter.id}")
