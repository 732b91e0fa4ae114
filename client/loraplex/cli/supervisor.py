"""`loraplex serve`: starts the ranks of one replica, runs a router in this process, and stops when the router stops or
the ranks cannot be restarted."""

import asyncio
import signal
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from pydantic import Field, model_validator
from rich.console import Console

from loraplex.cli.introduction import Pooled, introduction
from loraplex.cli.ranks import Ranks
from loraplex.cli.run_folder import run_folder
from loraplex_protos.generation_pb2 import GetModelInfoResponse
from loraplex_router.settings import EdgeSettings, RouterSettings
from loraplex_shard.settings import ModelSettings, ShardSettings

# How long requests wait while the ranks restart: loading a large model takes minutes. If the ranks are given up, the
# server stops, so requests do not wait any longer.
MOVE_SECONDS = 600.0


class ServeSettings(EdgeSettings, ModelSettings):
    """All settings to serve one model on one machine."""

    metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port of rank 0's GET /metrics, on 127.0.0.1; further ranks use the ports after it. 0: "
        "none, except the router's at --http-port.",
    )

    @model_validator(mode="after")
    def _metrics_ports_exist(self) -> Self:
        last = self.metrics_port + self.tp - 1
        if last > 65535:
            raise ValueError(
                f"metrics_port: {self.tp} ranks need the ports {self.metrics_port} to {last}; the highest port is 65535"
            )
        return self


async def run(settings: ServeSettings, console: Console) -> bool:
    """Serves until SIGTERM or SIGINT; returns whether it was SIGINT before it was ready. Raises UnavailableError if the
    ranks end and should not be restarted."""
    loop, this = asyncio.get_running_loop(), asyncio.current_task()
    assert this
    told = list[signal.Signals]()

    def stop(number: signal.Signals) -> None:  # until the router has its own handlers
        told.append(number)
        if len(told) == 1:
            this.cancel()

    for number in signal.SIGTERM, signal.SIGINT:
        loop.add_signal_handler(number, stop, number)
    with run_folder() as folder:
        addresses = [f"unix:{folder}/rank{rank}.sock" for rank in range(settings.tp)]
        ranks = Ranks(lambda rendezvous: shards(settings, addresses, rendezvous), folder)
        try:
            await ranks.start()
            return await _route(settings, addresses, ranks, console)
        except asyncio.CancelledError:  # by a signal: this is the whole process
            return told[0] == signal.SIGINT
        finally:
            await ranks.stop()


async def _route(settings: ServeSettings, addresses: Sequence[str], ranks: Ranks, console: Console) -> bool:
    """Runs the router, and restarts the ranks, until the router ends or the ranks should not be restarted. Returns
    whether SIGINT ended it before it was ready."""
    from loraplex_router import app  # takes a second, during which the shards are starting

    edge = settings.model_dump(include=set(EdgeSettings.model_fields))
    router_settings = RouterSettings(**edge, shards=(",".join(addresses),), move_seconds=MOVE_SECONDS)

    def ready(http_port: int, grpc_port: int, info: GetModelInfoResponse, adapters: list[str]) -> None:
        server, http = f"{settings.url_host}:{grpc_port}", f"{settings.scheme}://{settings.url_host}:{http_port}"
        if settings.scheme == "https":
            server = f"https://{server}"
        text = introduction(settings.model, server, http, adapters, info.has_chat_template, _pools(info))
        with suppress(OSError, SystemExit):  # its reader is gone, for which rich ends programs, or the disk is full
            console.print(text, highlight=False, soft_wrap=True)

    router = asyncio.create_task(app.run(router_settings, ready, ranks))
    keeping = asyncio.create_task(ranks.keep())
    try:
        await asyncio.wait([router, keeping], return_when=asyncio.FIRST_COMPLETED)
        return await (router if router.done() else keeping)
    finally:
        router.cancel()
        keeping.cancel()
        await asyncio.gather(router, keeping, return_exceptions=True)


def shards(settings: ServeSettings, addresses: Sequence[str], rendezvous: str) -> list[ShardSettings]:
    """The settings of the ranks, which listen at these addresses."""
    model = settings.model_dump(include=set(ModelSettings.model_fields))
    return [
        ShardSettings(
            **model,
            rank=rank,
            listen=address,
            rendezvous=rendezvous,
            metrics_port=settings.metrics_port and settings.metrics_port + rank,
        )
        for rank, address in enumerate(addresses)
    ]


def _pools(info: GetModelInfoResponse) -> Pooled | None:
    """What a model that does not generate is asked for."""
    if not info.embeds_only:
        return None
    return "classify" if info.HasField("classifier") else "embed"
