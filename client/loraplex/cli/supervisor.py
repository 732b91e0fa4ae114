"""`loraplex serve`: starts the ranks of one group, runs a router in this process, and stops when either ends."""

import asyncio
import ctypes
import os
import signal
import sys
import tempfile
from functools import partial
from typing import Self

from pydantic import Field, model_validator
from rich.console import Console

from loraplex.cli.introduction import introduction
from loraplex_protos.errors import UnavailableError
from loraplex_router.settings import EdgeSettings, RouterSettings
from loraplex_shard.settings import ModelSettings

STOP_SECONDS = 10  # for a shard after SIGTERM


class ServeSettings(EdgeSettings, ModelSettings):
    """Everything about one model on one machine."""

    metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port of rank 0's GET /metrics, at 127.0.0.1; the next ranks have the ports that follow. 0: "
        "none, except the router's at --http-port.",
    )

    @model_validator(mode="after")
    def _metrics_ports_exist(self) -> Self:
        if self.metrics_port + self.tp - 1 > 65535:
            raise ValueError(f"metrics_port: above {self.metrics_port} there are no ports for {self.tp} ranks")
        return self


async def run(settings: ServeSettings, console: Console) -> None:
    """Serves until SIGTERM or SIGINT. Raises UnavailableError if a rank ends before."""
    with tempfile.TemporaryDirectory(prefix="loraplex-") as folder:
        addresses = [f"unix:{folder}/rank{rank}.sock" for rank in range(settings.tp)]
        shards = [await _start_shard(settings, rank, address, folder) for rank, address in enumerate(addresses)]
        from loraplex_router import app  # takes a second, in which the shards have begun to start

        edge = settings.model_dump(include=set(EdgeSettings.model_fields))

        def ready(http_port: int, grpc_port: int) -> None:
            server, http = f"{settings.host}:{grpc_port}", f"http://{settings.host}:{http_port}"
            text = introduction(settings.model, server, http, settings.adapters)
            console.print(text, highlight=False, soft_wrap=True)

        router = asyncio.create_task(app.run(RouterSettings(**edge, shards=(",".join(addresses),)), ready))
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


def shard_flags(settings: ServeSettings, rank: int, address: str, folder: str) -> list[str]:
    """What `loraplex shard` is told as one of the ranks, which listens at `address`; `folder` is theirs."""
    flags = settings.model_dump(mode="json", include=set(ModelSettings.model_fields), exclude_none=True)
    flags |= {"rank": rank, "listen": address, "rendezvous": f"file://{folder}/rendezvous"}
    if settings.metrics_port:
        flags["metrics_port"] = settings.metrics_port + rank
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


async def _start_shard(settings: ServeSettings, rank: int, address: str, folder: str) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "loraplex.cli.main", "shard", *shard_flags(settings, rank, address, folder)]
    # The flags say all: variables are this process's settings.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAPLEX_")}
    # A session of its own: Ctrl-C reaches the router alone, which drains before it stops the shards.
    return await asyncio.create_subprocess_exec(
        *command, env=environment, start_new_session=True, preexec_fn=partial(_end_with_parent, os.getpid())
    )


def _end_with_parent(parent: int) -> None:
    """Lets the kernel stop a shard whose supervisor was killed (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was killed before this
            os._exit(0)


async def _stop_shard(shard: asyncio.subprocess.Process) -> None:
    if shard.returncode is None:
        shard.terminate()
        try:
            await asyncio.wait_for(shard.wait(), STOP_SECONDS)
        except TimeoutError:
            shard.kill()
