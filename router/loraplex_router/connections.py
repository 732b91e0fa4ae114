"""Keeps the router connected to the groups: finds them, takes them up, notices when they stop, and tries again."""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Protocol, TypeVar

from loraplex_protos.errors import LoraplexError
from loraplex_protos.mtls import channel_credentials
from loraplex_protos.shard_pb2 import GetInfoResponse
from loraplex_router.adapters.pool import AdapterPool
from loraplex_router.adapters.registry import AdapterRegistry
from loraplex_router.discovery import Address, Discovery
from loraplex_router.group import Group
from loraplex_router.groups import Groups
from loraplex_router.model import read_model
from loraplex_router.pulse import SilentError
from loraplex_router.scheduler import Limits
from loraplex_router.service import Service
from loraplex_router.settings import RouterSettings
from loraplex_router.telemetry.telemetry import Telemetry
from loraplex_router.wire.shard_group import ShardGroup

GIB = 2**30
RETRY_SECONDS = 1.0
POLL_SECONDS = 0.02

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Supervisor(Protocol):
    """Whoever started the only group's ranks, in the router's own process, and starts them again."""

    def ready(self) -> None:
        """The router has taken the group up."""

    def silent(self) -> None:
        """The router has given the group up, since it does not answer any more."""


class Connections:
    """`run` is its task. The first group says which model is served; one that does not fit it is refused."""

    def __init__(
        self,
        settings: RouterSettings,
        groups: Groups,
        registry: AdapterRegistry,
        service: Service,
        telemetry: Telemetry,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._supervisor = supervisor
        self._settings = settings
        self._groups = groups
        self._registry = registry
        self._service = service
        self._telemetry = telemetry
        self._tasks: dict[Address, asyncio.Task[None]] = {}
        self._wanted: set[Address] = set()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                async for addresses in Discovery(self._settings.shards).watch():
                    self._wanted = addresses
                    for address in addresses - self._tasks.keys():
                        self._tasks[address] = tasks.create_task(self._keep(address))
                    for address in self._tasks.keys() - addresses:
                        if not any(group.name == str(address) for group in self._groups):
                            self._tasks.pop(address).cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _keep(self, address: Address) -> None:
        """Drives the group at an address again and again, until discovery does not name it any more."""
        last = ""
        while address in self._wanted:
            telemetry = self._telemetry.group(str(address))
            shards = ShardGroup(address, telemetry, channel_credentials(self._settings))
            try:
                await self._drive(shards, str(address))
            except LoraplexError as error:
                if isinstance(error, SilentError) and self._supervisor is not None:
                    self._supervisor.silent()
                if error.message != last:
                    logger.warning("group %s: %s", address, error)
                last = error.message
            else:
                last = ""
            finally:
                await shards.close()
                self._telemetry.forget(str(address))
            await asyncio.sleep(RETRY_SECONDS)
        self._tasks.pop(address, None)

    async def _drive(self, shards: ShardGroup, name: str) -> None:
        """From connecting to the group until it has stopped. Raises the LoraplexError that ended it before."""
        watching = asyncio.create_task(shards.watch(partial(self._set_silent, name)))
        try:
            group = await _unless(watching, self._take_up(shards, name))
        except BaseException:
            watching.cancel()
            raise
        engine = asyncio.create_task(group.engine.run())
        stopping = asyncio.create_task(shards.stopping())
        tasks = watching, engine, stopping
        self._groups.add(group)
        self._telemetry.metrics.group_starts.inc()
        if self._supervisor is not None:
            self._supervisor.ready()
        logger.info("group %s is ready", name)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done() and not stopping.exception():
                logger.info("group %s is stopping", name)
                self._groups.close(group)
                while not (engine.done() or watching.done() or group.engine.idle):
                    await asyncio.sleep(POLL_SECONDS)
        finally:
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            self._telemetry.metrics.group_losses.labels(_reason(errors)).inc()
            self._groups.remove(group)
        if errors:
            raise errors[0]

    def _set_silent(self, name: str, silent: bool) -> None:
        if silent:
            self._telemetry.metrics.group_silences.inc()
        self._groups.set_silent(name, silent)

    async def _take_up(self, shards: ShardGroup, name: str) -> Group:
        await shards.connect(self._settings.max_batch_tokens)
        info = shards.info
        limits = Limits(max(self._settings.max_batch_tokens, info.max_sequences), info.max_sequences, info.block_size)
        slots = self._settings.max_adapters_on_device
        names, files = self._settings.served_model_names, await shards.tokenizer()
        generation_config = self._settings.generation_config
        model = read_model(info, files, limits.max_batch_tokens, slots, names, generation_config)
        self._service.serve(model)
        pool = AdapterPool(slots, adapter_bytes(self._settings, info))
        return Group(name, shards, limits, info.num_blocks, pool, self._registry, self._telemetry)


def adapter_bytes(settings: RouterSettings, info: GetInfoResponse) -> int:
    """What a group's adapters may take of host memory, over all ranks: what was set, or as much as there is."""
    there = info.adapter_host_bytes * info.tensor_parallel_size
    wanted = int(settings.adapter_host_gib * GIB)
    if wanted > there:
        logger.warning(
            "adapter_host_gib: %g GiB were asked for; the shards have %.2f for adapters, and more is not used",
            wanted / GIB,
            there / GIB,
        )
    return min(wanted or there, there)


async def _unless(failing: asyncio.Task[None], call: Coroutine[None, None, T]) -> T:
    """What the call returns, unless the task ends before it, which then raises why."""
    calling = asyncio.create_task(call)
    try:
        await asyncio.wait([calling, failing], return_when=asyncio.FIRST_COMPLETED)
        if not calling.done():
            failing.result()
        return await calling
    finally:
        calling.cancel()


def _reason(errors: Sequence[Exception]) -> str:
    """Why a group was lost that left these."""
    if not errors:
        return "stopped"
    return "silent" if isinstance(errors[0], SilentError) else "failed"
