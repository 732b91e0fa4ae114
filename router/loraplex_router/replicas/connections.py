"""Keeps the router connected to the replicas: finds them, connects, notices when they stop, and reconnects."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Protocol, TypeVar

from loraplex_protos.errors import LoraplexError
from loraplex_protos.mtls import channel_credentials
from loraplex_protos.shard_pb2 import GetInfoResponse
from loraplex_router.adapters.resolutions import Resolutions
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.engine.scheduler import Limits
from loraplex_router.loops import keep_running
from loraplex_router.replicas.observer import Observer, ReplicaObserver
from loraplex_router.replicas.replica import Replica
from loraplex_router.replicas.replicas import Replicas
from loraplex_router.settings import RouterSettings
from loraplex_router.text.model import Model, read_model
from loraplex_router.wire.discovery import Address, Discovery
from loraplex_router.wire.pulse import SilentError
from loraplex_router.wire.shard_group import ShardGroup

GIB = 2**30
RETRY_SECONDS = 1.0

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Supervisor(Protocol):
    """What starts and restarts the only replica's ranks, in the router's own process."""

    def ready(self) -> None:
        """The router uses the replica now."""

    def silent(self) -> None:
        """The router has given the replica up, since it no longer answers."""


class Connections:
    """`run` is its task. The first replica determines the served model; replicas that do not match are refused. Raises
    OSError if the certificates cannot be read."""

    def __init__(
        self,
        settings: RouterSettings,
        replicas: Replicas,
        resolutions: Resolutions,
        serve: Callable[[Model], None],
        observer: Observer,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._supervisor = supervisor
        self._settings = settings
        self._replicas = replicas
        self._resolutions = resolutions
        self._serve = serve
        self._observer = observer
        channel_credentials(settings)  # raises OSError at the start; later, what is wrong is tried again
        self._tasks: dict[Address, asyncio.Task[None]] = {}
        self._wanted: set[Address] = set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            await keep_running(partial(self._discover, tasks))

    async def _discover(self, tasks: asyncio.TaskGroup) -> None:
        async for addresses in Discovery(self._settings.shards).watch():
            self._wanted = addresses
            for address in addresses - self._tasks.keys():
                self._tasks[address] = tasks.create_task(keep_running(partial(self._keep, address)))
            for address in self._tasks.keys() - addresses:
                if not any(replica.name == str(address) for replica in self._replicas):
                    self._tasks.pop(address).cancel()

    async def _keep(self, address: Address) -> None:
        """Drives the replica at an address, reconnecting as needed, until discovery no longer lists it."""
        last = ""
        while address in self._wanted:
            try:
                await self._connect(address)
            except (LoraplexError, OSError) as error:  # OSError: a certificate that is being renewed
                if isinstance(error, SilentError) and self._supervisor is not None:
                    self._supervisor.silent()
                if str(error) != last:
                    logger.warning("replica %s: %s", address, error)
                last = str(error)
            else:
                last = ""
            await asyncio.sleep(RETRY_SECONDS)
        self._tasks.pop(address, None)

    async def _connect(self, address: Address) -> None:
        """Drives the replica until it has stopped. Raises the LoraplexError that ended it earlier, OSError if a file of
        mutual TLS cannot be read, or none can be opened now."""
        credentials = channel_credentials(self._settings)
        observer = self._observer.replica(str(address))
        shards = ShardGroup(address, observer, credentials)
        try:
            await self._drive(shards, observer, str(address))
        finally:
            await shards.close()
            self._observer.forget(str(address))

    async def _drive(self, shards: ShardGroup, observer: ReplicaObserver, name: str) -> None:
        """Connects to the replica and drives it until it has stopped. Raises the LoraplexError that ended it
        earlier."""
        watching = asyncio.create_task(shards.watch(partial(self._set_silent, name)))
        try:
            replica = await _unless(watching, self._take_up(shards, observer, name))
        except BaseException:
            watching.cancel()
            raise
        engine = asyncio.create_task(replica.engine.run())
        stopping = asyncio.create_task(shards.stopping())
        tasks = watching, engine, stopping
        self._replicas.add(replica)
        if self._supervisor is not None:
            self._supervisor.ready()
        logger.info("replica %s is ready", name)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done() and not stopping.exception():
                logger.info("replica %s is stopping", name)
                self._replicas.drain(replica)
                idle = self._replicas.changes.until(lambda: replica.engine.idle or engine.done() or watching.done())
                for task in (engine, watching):
                    task.add_done_callback(lambda _: self._replicas.changes.notify())
                await idle
        finally:
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            self._observer.lost(_reason(errors))
            self._replicas.remove(replica)
        if errors:
            raise errors[0]

    def _set_silent(self, name: str, silent: bool) -> None:
        if silent:
            self._observer.silent()
        self._replicas.set_silent(name, silent)

    async def _take_up(self, shards: ShardGroup, observer: ReplicaObserver, name: str) -> Replica:
        await shards.connect()
        info = shards.info
        limits = Limits(
            info.max_batch_tokens,
            info.max_sequences,
            info.block_size,
            shares_prefixes=self._settings.prefix_cache == "shared",
            reuses_prefixes=not info.state_bytes,
        )
        slots = self._settings.max_adapters_on_device
        names, files = self._settings.served_model_names, await shards.tokenizer()
        defaults, parser = self._settings.generation_config, self._settings.reasoning_parser
        model = read_model(info, files, slots, names, defaults, parser)
        self._serve(model)
        pool = AdapterPool(slots, adapter_bytes(self._settings, info), info.adapter_device_bytes)
        return Replica(
            name,
            shards,
            limits,
            info.num_blocks,
            pool,
            self._resolutions,
            observer,
            self._replicas.changes,
        )


def adapter_bytes(settings: RouterSettings, info: GetInfoResponse) -> int:
    """Bytes of host memory for a replica's adapters, over all ranks: the setting, at most what the shards have."""
    there = info.adapter_host_bytes * info.tensor_parallel_size
    wanted = int(settings.adapter_host_gib * GIB)
    if wanted > there:
        logger.warning(
            "adapter_host_gib is %g, but the shards have only %.2f GiB for adapters: using that",
            wanted / GIB,
            there / GIB,
        )
    return min(wanted or there, there)


async def _unless(failing: asyncio.Task[None], call: Coroutine[None, None, T]) -> T:
    """The call's result; if the task ends first, raises the task's error."""
    calling = asyncio.create_task(call)
    try:
        await asyncio.wait([calling, failing], return_when=asyncio.FIRST_COMPLETED)
        if not calling.done():
            failing.result()
        return await calling
    finally:
        calling.cancel()


def _reason(errors: Sequence[Exception]) -> str:
    """Why a replica with these errors was lost."""
    if not errors:
        return "stopped"
    return "silent" if isinstance(errors[0], SilentError) else "failed"
