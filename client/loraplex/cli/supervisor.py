"""`loraplex serve`: starts the ranks of one group, runs a router in this process, and stops when either ends."""

import asyncio
import ctypes
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from loraplex_protos.errors import UnavailableError
from loraplex_router import app
from loraplex_router.settings import EdgeSettings, RouterSettings
from loraplex_shard.settings import ModelSettings

STOP_SECONDS = 10  # for a shard after SIGTERM


class ServeSettings(EdgeSettings, ModelSettings):
    """Everything about one model on one machine."""


async def run(settings: ServeSettings, console: Console) -> None:
    """Serves until SIGTERM or SIGINT. Raises UnavailableError if a rank ends before."""
    with tempfile.TemporaryDirectory(prefix="loraplex-") as folder:
        addresses = [f"unix:{folder}/rank{rank}.sock" for rank in range(settings.tp)]
        shards = [await _start_shard(settings, rank, address, folder) for rank, address in enumerate(addresses)]
        edge = settings.model_dump(include=set(EdgeSettings.model_fields))

        def ready(http_port: int, grpc_port: int) -> None:
            _introduce(settings, http_port, grpc_port, console)

        router = asyncio.create_task(app.run(RouterSettings(**edge, shards=tuple(addresses)), ready))
        ends = [asyncio.create_task(shard.wait()) for shard in shards]
        try:
            await asyncio.wait([router, *ends], return_when=asyncio.FIRST_COMPLETED)
            ended = [rank for rank, end in enumerate(ends) if end.done()]
            if ended and not router.done():
                raise UnavailableError(f"rank {ended[0]} ended with status {ends[ended[0]].result()}; see above")
            await router
        finally:
            router.cancel()
            await asyncio.gather(*map(_stop_shard, shards), router, return_exceptions=True)


async def _start_shard(settings: ServeSettings, rank: int, address: str, folder: str) -> asyncio.subprocess.Process:
    model = settings.model_dump(mode="json", include=set(ModelSettings.model_fields), exclude_none=True)
    flags = {**model, "rank": rank, "listen": address, "rendezvous": f"file://{folder}/rendezvous"}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    command = [sys.executable, "-m", "loraplex.cli.main", "shard", *arguments]
    # A session of its own: Ctrl-C reaches the router alone, which drains before it stops the shards.
    return await asyncio.create_subprocess_exec(*command, start_new_session=True, preexec_fn=_end_with_parent)


def _end_with_parent() -> None:
    """Lets the kernel stop a shard whose supervisor was killed (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


async def _stop_shard(shard: asyncio.subprocess.Process) -> None:
    if shard.returncode is None:
        shard.terminate()
        try:
            await asyncio.wait_for(shard.wait(), STOP_SECONDS)
        except TimeoutError:
            shard.kill()


def _introduce(settings: ServeSettings, http_port: int, grpc_port: int, console: Console) -> None:
    """Prints the addresses, and a request to try for each way to call the server."""
    server = f"{settings.host}:{grpc_port}"
    http = f"http://{settings.host}:{http_port}"
    adapters = sorted(path.parent.name for path in (settings.adapters or Path()).glob("*/adapter_config.json"))
    adapter = adapters[0] if settings.adapters and adapters else None
    flag = f" --adapter {adapter}" if adapter else ""
    argument = f', adapter="{adapter}"' if adapter else ""
    field = f', "adapter": {{"id": "{adapter}"}}' if adapter else ""
    bin = _bin_folder()
    prompt = "Anna loves the new office in Berlin."
    messages = f'"messages": [{{"role": "user", "content": "{prompt}"}}]'
    chat = f'{{"chat": {{{messages}}}{field}, "stopping": {{"max_new_tokens": 64}}}}'
    call = f'Client("{server}").generate("Hello", max_new_tokens=32{argument})'
    script = f"from loraplex import Client; print({call}.text)"
    method = "loraplex.v1.GenerationService/GenerateStream"
    lines = (
        f"loraplex serves [bold]{settings.model or 'SmolLM2-135M-Instruct'}[/]",
        f"  gRPC  {server}",
        f"  HTTP  {http}  (/health, /metrics)",
        f"  adapters  {', '.join(adapters)}" if adapter else "",
        "",
        "Try it:",
        f'  {bin}loraplex generate "{prompt}"{flag} --server {server}',
        f"  {bin}loraplex chat{flag} --server {server}",
        f"  {bin}python -c '{script}'",
        f"  {bin}buf curl --protocol grpc --http2-prior-knowledge -d '{chat}' http://{server}/{method}",
        f"  curl -i {http}/health",
    )
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _bin_folder() -> str:
    """What goes before a command's name, so that it runs where the user is: nothing if it is on the PATH."""
    folder = Path(sys.executable).parent
    if shutil.which("loraplex") == str(folder / "loraplex"):
        return ""
    return f"{folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder}/"
