"""Builds the router from its parts and runs it until it is told to stop."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.metadata import version

import jinja2
import uvicorn

from loraplex_protos import generation_pb2, shard_pb2
from loraplex_protos.errors import UnavailableError
from loraplex_router.adapters.pool import AdapterPool
from loraplex_router.adapters.registry import AdapterRegistry
from loraplex_router.api.grpc import GenerationApi, GrpcServer
from loraplex_router.api.http.app import create_app
from loraplex_router.blocks import BlockAllocator
from loraplex_router.engine import Engine
from loraplex_router.key_file import read_keys
from loraplex_router.keys import Keys
from loraplex_router.scheduler import Limits, Scheduler
from loraplex_router.service import Service, ServiceLimits
from loraplex_router.settings import RouterSettings
from loraplex_router.shards import ShardGroup
from loraplex_router.telemetry.opening import open_telemetry
from loraplex_router.telemetry.telemetry import Telemetry
from loraplex_router.text.chat import ChatTemplate
from loraplex_router.text.foreign_templates import ForeignTemplates
from loraplex_router.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Router:
    """One router process. `run` returns after a drain; it raises UnavailableError if a shard is lost."""

    def __init__(
        self,
        settings: RouterSettings,
        shards: ShardGroup,
        tokenizer: Tokenizer,
        templates: ForeignTemplates,
        keys: Keys,
        telemetry: Telemetry,
    ) -> None:
        info = shards.info
        self._settings = settings
        pool = AdapterPool(settings.max_adapters_on_device, int(settings.adapter_host_gib * 2**30))
        blocks = BlockAllocator(info.num_blocks)
        limits = Limits(max(settings.max_batch_tokens, info.max_sequences), info.max_sequences, info.block_size)
        scheduler = Scheduler(limits, blocks, pool)
        telemetry.metrics.describe_build(info.model_id)
        telemetry.watch("0", scheduler, blocks, pool)
        self._engine = Engine(scheduler, pool, shards, telemetry.group("0"))
        self._service = Service(
            ServiceLimits(
                max_model_len=min(info.max_model_len, info.num_blocks * info.block_size),
                vocab_size=info.vocab_size,
                max_queue=settings.max_queue,
                end_token_ids=tuple(info.end_token_ids),
            ),
            tokenizer,
            templates,
            AdapterRegistry(shards, pool),
            scheduler,
            self._engine,
            keys,
            telemetry,
        )
        model_info = self._model_info(info, limits)
        self._grpc = GrpcServer(GenerationApi(self._service, model_info), telemetry.interceptors)
        self._app = create_app(self._service, model_info, lambda: not self._service.draining)
        self._stop = asyncio.Event()

    def _model_info(self, info: shard_pb2.GetInfoResponse, limits: Limits) -> generation_pb2.GetModelInfoResponse:
        return generation_pb2.GetModelInfoResponse(
            model_id=info.model_id,
            architecture=info.architecture,
            dtype=info.dtype,
            vocab_size=info.vocab_size,
            max_model_len=self._service.limits.max_model_len,
            tensor_parallel_size=info.tensor_parallel_size,
            kv_block_size=info.block_size,
            kv_blocks=info.num_blocks,
            max_batch_tokens=limits.max_batch_tokens,
            max_adapters_on_device=self._settings.max_adapters_on_device,
            version=version("loraplex"),
            has_chat_template=self._service.tokenizer.chat_template is not None,
        )

    async def run(self, ready: Callable[[int, int], None]) -> None:
        """Serves until SIGTERM or SIGINT, then drains. `ready` is called with the HTTP and the gRPC port."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        engine = asyncio.create_task(self._engine.run())
        async with self._http() as http_port:
            grpc_port = await self._grpc.start(self._settings.host, self._settings.grpc_port)
            gc.freeze()  # what start-up made is not looked through again at every collection
            ready(http_port, grpc_port)
            stop = asyncio.create_task(self._stop.wait())
            await asyncio.wait((engine, stop), return_when=asyncio.FIRST_COMPLETED)
            self._service.draining = True
            await self._grpc.drain()
            if not engine.done():
                await self._drain()
            await self._grpc.stop(grace=1.0)
        engine.cancel()
        stop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await engine

    async def _drain(self) -> None:
        """No new requests; running ones finish, up to a limit."""
        logger.info("draining for at most %g seconds", self._settings.drain_seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_seconds):
                while not self._service.idle:
                    await asyncio.sleep(0.02)
        self._service.cancel_all()

    @contextlib.asynccontextmanager
    async def _http(self) -> AsyncIterator[int]:
        listener = socket.create_server((self._settings.host, self._settings.http_port))
        server = HttpServer(uvicorn.Config(self._app, log_level="warning", log_config=None, lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await serving


class HttpServer(uvicorn.Server):
    """Uvicorn without its signal handlers: the router decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run(settings: RouterSettings, ready: Callable[[int, int], None]) -> None:
    """Connects to the shards and serves.

    Raises KeyFileError for a key file that cannot be used, UnavailableError if the shards are lost or not one group.
    """
    keys = read_keys(settings.api_keys) if settings.api_keys else Keys({})
    shards = ShardGroup(settings.shards)
    try:
        await shards.connect(max_batch_tokens=settings.max_batch_tokens)
        files = await shards.tokenizer()
        templates = ForeignTemplates(files.bos_token, files.eos_token)
        async with contextlib.aclosing(templates):
            with open_telemetry(settings) as telemetry:
                router = Router(settings, shards, _read_tokenizer(files), templates, keys, telemetry)
                await router.run(ready)
    finally:
        await shards.close()


def _read_tokenizer(files: shard_pb2.GetTokenizerResponse) -> Tokenizer:
    template = None
    if files.chat_template:
        try:
            template = ChatTemplate(files.chat_template, files.bos_token, files.eos_token)
        except jinja2.TemplateError as error:
            raise UnavailableError(f"the model's chat template cannot be read: {error}") from error
    return Tokenizer(files.tokenizer_json, template)
