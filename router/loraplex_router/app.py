"""Builds the router from its parts and runs it until it is stopped."""

import asyncio
import contextlib
import errno
import gc
import logging
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import TypeAlias

import uvicorn

from loraplex_protos.errors import LoraplexError, UnavailableError
from loraplex_protos.generation_pb2 import GetModelInfoResponse
from loraplex_router.access.key_file import KeyFile
from loraplex_router.access.keys import Keys
from loraplex_router.access.limit_store import LimitStore
from loraplex_router.access.shared_limits import SharedLimits
from loraplex_router.adapters.registry import Registry
from loraplex_router.adapters.registry_file import RegistryFile
from loraplex_router.adapters.resolutions import Resolutions
from loraplex_router.api.grpc import GenerationApi, GrpcServer
from loraplex_router.api.http.app import create_app
from loraplex_router.api.http.connection import Connection
from loraplex_router.api.http.face import build_routes
from loraplex_router.api.http.inner_calls import InnerCalls
from loraplex_router.api.tls import Tls
from loraplex_router.batches.opening import open_batches
from loraplex_router.batches.runner import BatchRunner
from loraplex_router.journal.journal import Journal
from loraplex_router.journal.redis_store import RedisStore
from loraplex_router.journal.stores import MemoryStore
from loraplex_router.loops import keep_running
from loraplex_router.replicas.administration import Administration
from loraplex_router.replicas.connections import Connections, Supervisor
from loraplex_router.replicas.declarations import Declarations
from loraplex_router.replicas.prefetching import Prefetching
from loraplex_router.replicas.replicas import Replicas
from loraplex_router.replicas.uploads import Uploads
from loraplex_router.service.service import Service
from loraplex_router.settings import MEMORY, RouterSettings
from loraplex_router.store.redis_server import RedisServer
from loraplex_router.telemetry.opening import open_telemetry
from loraplex_router.telemetry.telemetry import Telemetry
from loraplex_router.usage.redis_ledger import RedisLedger

logger = logging.getLogger(__name__)

SWITCH_SECONDS = 0.001  # how long a tokenizing or rendering thread may hold the GIL while the event loop waits
LOST_SECONDS = 60.0  # for which what a router that died has streamed is kept longer, until others have counted it
STOP_SECONDS = 4  # for each of the two faces after the drain: the chart's grace period leaves ten in all

# Called with the HTTP port, the gRPC port, whether the model has a chat template, and the available adapters.
Ready: TypeAlias = Callable[[int, int, GetModelInfoResponse, list[str]], None]


class Router:
    """One router process. It listens from the start, and is healthy while a replica is ready."""

    def __init__(
        self,
        settings: RouterSettings,
        key_file: KeyFile | None,
        telemetry: Telemetry,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._settings = settings
        resolutions = Resolutions()
        self._replicas = Replicas(telemetry, settings.move_seconds)
        self._registry = Registry(self._replicas.changes.notify)
        self._prefetching = Prefetching(self._registry, self._replicas, int(settings.adapter_prefetch_gib * 2**30))
        self._administration = Administration(resolutions, self._replicas, self._registry, self._prefetching)
        self._registry_file = (
            RegistryFile(
                settings.adapter_registry,
                self._registry,
                self._administration.retire,
                settings.adapter_uploads_mib << 20,
            )
            if settings.adapter_registry
            else None
        )
        telemetry.metrics.watch_registry(lambda: bool(self._registry.fault))
        self._key_file = key_file
        keys = key_file.keys if key_file else Keys({})
        declarations = Declarations(self._administration, self._registry_file)
        uploads = Uploads(self._administration, declarations, self._replicas, settings.adapter_uploads_mib << 20)
        seconds, usage = settings.resume_seconds, telemetry.usage
        self._redis = RedisServer(settings.store) if settings.store not in ("", MEMORY) else None
        streams = RedisStore(self._redis, seconds + LOST_SECONDS) if self._redis else MemoryStore(seconds)
        self._journal = Journal(streams, seconds) if settings.store else None
        self._limits = SharedLimits(LimitStore(self._redis)) if self._redis else None
        if self._journal:
            usage.write_streams = self._journal.flush
        if redis := self._redis:
            usage.ledger = RedisLedger(redis)
            telemetry.metrics.watch_store(lambda: redis.fails)
        self._usage = usage
        self._service = Service(
            self._replicas,
            self._administration,
            uploads,
            declarations,
            keys,
            settings.max_queue,
            telemetry,
            settings.metrics_auth,
            self._journal,
            self._limits,
            settings.stored_responses_mib << 20,
            open_batches(settings.batches, int(settings.batches_gib * 2**30)) if settings.batches else None,
        )
        self._connections = Connections(
            settings, self._replicas, resolutions, self._service.serve, telemetry, supervisor
        )
        max_body = settings.max_body_mib << 20
        self._tls = Tls(settings.tls_cert, settings.tls_key) if settings.tls_cert and settings.tls_key else None
        credentials = self._tls.grpc_credentials() if self._tls else None
        self._grpc = GrpcServer(GenerationApi(self._service), keys, max_body, telemetry.interceptors, credentials)
        self._app = create_app(self._service, settings.cors_origins.split(), max_body, settings.host)
        build_routes(self._app)
        self._batches = (
            BatchRunner(self._service.batches, InnerCalls(self._app, keys).post, max_body, settings.max_queue)
            if self._service.batches
            else None
        )
        self._stop = asyncio.Event()
        self._hurried = False  # the drain is cut short
        self._given_up = False  # by SIGINT while no replica was ready

    async def run(self, ready: Ready) -> bool:
        """Serves until SIGTERM or SIGINT, then drains; another SIGINT ends that. Calls `ready` once a replica is ready;
        returns whether SIGINT came while none was. If cancelled, running requests end with UnavailableError."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        async with self._http() as http_port:
            listen(self._settings.host, self._settings.grpc_port, "--grpc-port").close()  # gRPC reports no reason
            grpc_port = await self._grpc.start(self._settings.host, self._settings.grpc_port)
            logger.info("listening on port %d (gRPC) and port %d (HTTP)", grpc_port, http_port)
            work = asyncio.create_task(self._work(lambda names: ready(http_port, grpc_port, self._service.info, names)))
            try:
                await self._stop.wait()
                await self._drain()
            finally:
                self._replicas.fail_all(UnavailableError("the server is shutting down"))
                work.cancel()
                # Both waits are limited: after SIGTERM the process must exit.
                await asyncio.wait([work, asyncio.create_task(self._grpc.stop(grace=1.0))], timeout=STOP_SECONDS)
                await self._service.aclose()
                if self._redis:
                    await self._redis.aclose()
        return self._given_up

    async def _work(self, ready: Callable[[list[str]], None]) -> None:
        loops: list[Callable[[], Awaitable[None]]] = [
            self._connections.run,
            self._prefetching.run,
            self._tell_health,
            self._restore_pins,
            self._usage.run,
            self._service.requests.spend,
            partial(self._announce, ready),
        ]
        loops += [file.follow for file in (self._key_file, self._registry_file, self._tls) if file]
        loops += [each.run for each in (self._journal, self._limits, self._batches) if each]
        await asyncio.gather(*map(keep_running, loops))

    def _interrupt(self) -> None:
        if self._stop.is_set():
            self._hurried = True
            self._replicas.changes.notify()
        else:
            self._given_up = not self._replicas.ready.is_set()
        self._stop.set()

    async def _announce(self, ready: Callable[[list[str]], None]) -> None:
        await self._replicas.ready.wait()
        gc.freeze()  # objects from start-up are left out of later collections
        try:
            names = await self._administration.listing.names()
        except LoraplexError:  # the replica has left again
            names = {}
        ready(sorted(names))

    async def _tell_health(self) -> None:
        healthy = False
        while True:
            healthy = await self._replicas.changes.unlike(lambda: self._service.healthy, healthy)
            await self._grpc.set_healthy(healthy)

    async def _restore_pins(self) -> None:
        seen = 0, 0
        while True:
            seen = await self._replicas.changes.unlike(lambda: (self._replicas.version, self._registry.edition), seen)
            if self._replicas.ready.is_set():
                self._administration.follow_pins()
                await self._administration.restore_pins()

    async def _drain(self) -> None:
        """Refuses new requests and lets running ones finish, up to a limit."""
        self._service.requests.draining = True
        await self._grpc.drain()
        logger.info("draining for at most %g seconds; Ctrl-C ends it", self._settings.drain_seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._replicas.changes.until(lambda: self._hurried or self._service.requests.idle)
        await self._service.requests.hand_over()

    @contextlib.asynccontextmanager
    async def _http(self) -> AsyncIterator[int]:
        listener = listen(self._settings.host, self._settings.http_port, "--http-port")
        tls = self._tls
        server = HttpServer(
            uvicorn.Config(
                self._app,
                http=Connection,
                log_level="warning",
                log_config=None,
                lifespan="off",
                timeout_graceful_shutdown=STOP_SECONDS,
                ssl_context_factory=(lambda *_: tls.context) if tls else None,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await serving


def listen(host: str, port: int, flag: str) -> socket.socket:
    """A listening socket on an IPv4 or IPv6 address; `::` listens on both. `flag`: the option that sets the port.
    Raises OSError with the fix."""
    both = host == "::" and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} is in use: stop its owner, or choose another {flag} (0: any)") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise OSError(f"this user may not open port {port}: choose a {flag} above 1023") from error
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise OSError(f"--host: {host} is not an address of this machine: {reason}") from error


def raise_file_limit() -> None:
    """Raises the limit on open files to the maximum: the default can be about a thousand connections."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # on some systems, "no limit" is not a number
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class HttpServer(uvicorn.Server):
    """Uvicorn without its signal handlers: the router decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run(settings: RouterSettings, ready: Ready, supervisor: Supervisor | None = None) -> bool:
    """Serves the shards' model; returns whether SIGINT ended it while no replica was ready. `supervisor`: restarts the
    only replica's ranks, if this process started them.

    Raises KeyFileError or RegistryFileError for an invalid file, OSError for a port in use or a wrong certificate."""
    key_file = KeyFile(settings.api_keys) if settings.api_keys else None
    sys.setswitchinterval(SWITCH_SECONDS)
    raise_file_limit()
    with open_telemetry(settings) as telemetry:
        return await Router(settings, key_file, telemetry, supervisor).run(ready)
