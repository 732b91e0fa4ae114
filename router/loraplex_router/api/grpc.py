"""The gRPC face: generation.proto over the service."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import BEGUN, FieldViolation, InvalidRequestError, LoraplexError, to_status
from loraplex_protos.generation_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)
from loraplex_router.access.keys import Keys
from loraplex_router.api.chats import create_reader, read_chat
from loraplex_router.api.descriptors import most_grpc_connections
from loraplex_router.api.message_limits import MessageLimits, key_of
from loraplex_router.api.pooled import (
    read_classify_request,
    read_embed_request,
    write_classifications,
    write_embeddings,
    write_spans,
)
from loraplex_router.api.readers import read_each
from loraplex_router.api.translation import Writer, read_adapter_name, read_reference, read_request, read_targets
from loraplex_router.api.turns import in_turn
from loraplex_router.api.uploads import read_announcement, read_data, read_rest, receive, split
from loraplex_router.engine.generation import Generation
from loraplex_router.replicas.listing import AT_A_TIME
from loraplex_router.service.service import Service
from loraplex_router.vocabulary.request import Request

logger = logging.getLogger(__name__)

API = pb.DESCRIPTOR.services_by_name["GenerationService"]
KEYLESS: tuple[Any, ...] = (  # services for which nobody needs a key
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
)
SERVICE = API.full_name
MAX_WATCHES = 1000  # health checks that stay open
MAX_SPANS = 2**17  # an answer of some 4 MB

SERVER_OPTIONS = (
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a limit holds for a message as it arrives
    # Clients and proxies may ping as often as they like: the penalty is to lose the connection, and all calls on it.
    ("grpc.http2.max_ping_strikes", 0),
    # A client whose host is gone cannot cancel its calls: pings that stay unanswered end them.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),  # no limit: an answer may take long to begin
    # Clients connect anew every ten minutes, without harm to calls in progress: only then do they look for new routers.
    ("grpc.max_connection_age_ms", 600_000),
    # What can be kept open without a call that goes on.
    ("grpc.max_connection_idle_ms", 120_000),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_concurrent_streams", 1000),  # of a connection; clients let further calls wait
    ("grpc.so_reuseport", 0),  # a second server on the same port is an error, not a lottery
)

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationApi(GenerationServiceServicer):
    """Deadlines and clients that leave are handled by gRPC, which cancels the handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        async with _answering(context):
            if request.resume_token:
                raise InvalidRequestError(FieldViolation("resume_token", "only GenerateStream resumes a stream"))
            generations = await self._service.generate_each(_read(request, context), key_of(context))
            try:
                await context.send_initial_metadata(((BEGUN, "1"),))  # from here on clients do not try again
                writer = self._writer(request, generations)
                deltas = [delta for generation in generations for delta in await generation.collect()]
                size = sum(generation.num_logprobs for generation in generations)
                return await in_turn(size, lambda: writer.response(deltas))
            finally:
                for generation in generations:
                    self._service.requests.close(generation)

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        async with _answering(context):
            stream = self._service.requests.stream("resume_token", request.resume_token)
            generations = await self._service.generate_each(_read(request, context), key_of(context), stream=stream)
            try:
                writer = self._writer(request, generations)
                async for index, delta in read_each(generations, Generation.deltas):
                    event = await in_turn(writer.num_logprobs(index, delta), partial(writer.event, index, delta))
                    if stream is not None:
                        await stream.advance(index, delta)
                        event.resume_token = stream.position()
                    if not delta.known:
                        yield event
            finally:
                for generation in generations:
                    self._service.requests.close(generation)

    def _writer(self, request: pb.GenerateRequest, generations: Sequence[Generation]) -> Writer:
        return Writer(generations, self._service.tokenizer_of, lambda output: create_reader(request, output.thoughts))

    async def CancelGeneration(
        self, request: pb.CancelGenerationRequest, context: Context
    ) -> pb.CancelGenerationResponse:
        async with _answering(context):
            self._service.cancel_request(request.request_id, key_of(context))
            return pb.CancelGenerationResponse()

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        async with _answering(context):
            embeddings = await self._service.pooling.embed(read_embed_request(request), key_of(context))
            return await in_turn(sum(len(e.values) for e in embeddings), lambda: write_embeddings(embeddings))

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        async with _answering(context):
            asked, key, pooling = read_classify_request(request), key_of(context), self._service.pooling
            found = await pooling.classify(asked, key)
            places = [await pooling.places(text, each, key) for text, each in zip(asked.inputs, found, strict=True)]
            size = sum(len(each.logits) for each in found)
            return await in_turn(size, lambda: write_classifications(found, places, request.raw_logits))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        async with _answering(context):
            if request.WhichOneof("input") is None:
                raise InvalidRequestError(FieldViolation("input", "set text or chat"))
            chat = request.HasField("chat")
            prompt = read_chat(request.chat) if chat else request.text
            spans = await self._service.tokenize(
                prompt, not chat and not request.skip_special_tokens, None, key_of(context)
            )
            if len(spans) > MAX_SPANS:
                many = f"has {len(spans)} tokens: at most {MAX_SPANS} are answered at once; HTTP's /tokenize takes more"
                raise InvalidRequestError(FieldViolation("input", many))
            return await asyncio.to_thread(write_spans, spans)

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        async with _answering(context):
            if request.page_size < 0:
                raise InvalidRequestError(FieldViolation("page_size", "must not be negative"))
            statuses, more = await self._service.adapters.list(key_of(context), request.page_token, request.page_size)
            response = pb.ListAdaptersResponse(next_page_token=statuses[-1].id if more else "")
            for start in range(0, len(statuses), AT_A_TIME):
                response.adapters.extend(statuses[start : start + AT_A_TIME])
                await asyncio.sleep(0)  # others have their turn
            return response

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.LoadAdapterResponse:
        async with _answering(context):
            status = await self._service.adapters.load(read_reference(request.adapter), key_of(context))
            return pb.LoadAdapterResponse(adapter=status)

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[pb.UploadAdapterRequest], context: Context
    ) -> pb.UploadAdapterResponse:
        async with _answering(context):
            self._service.keys.administrator(key_of(context))
            async with read_rest(request_iterator):
                upload, files = await read_announcement(request_iterator)

                async def read() -> dict[str, memoryview]:
                    return split(await receive(read_data(request_iterator), upload.size), files)

                status = await self._service.adapters.upload(upload, read, key_of(context))
            return pb.UploadAdapterResponse(adapter=status)

    async def RegisterAdapter(self, request: pb.RegisterAdapterRequest, context: Context) -> pb.RegisterAdapterResponse:
        async with _answering(context):
            expected = request.expected_version if request.HasField("expected_version") else None
            reference = read_reference(request.adapter)
            status = await self._service.adapters.register(request.name, reference, expected, key_of(context))
            return pb.RegisterAdapterResponse(adapter=status)

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        async with _answering(context):
            targets = read_targets(request.targets)
            expected = read_targets(request.expected.targets) if request.HasField("expected") else None
            status = await self._service.adapters.set_alias(request.name, targets, expected, key_of(context))
            return pb.SetAliasResponse(adapter=status)

    async def RemoveAdapter(self, request: pb.RemoveAdapterRequest, context: Context) -> pb.RemoveAdapterResponse:
        async with _answering(context):
            expected = request.expected_version if request.HasField("expected_version") else None
            await self._service.adapters.remove(request.name, expected, key_of(context))
            return pb.RemoveAdapterResponse()

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Context) -> pb.UnloadAdapterResponse:
        async with _answering(context):
            await self._service.adapters.unload(read_adapter_name(request), request.wait, key_of(context))
            return pb.UnloadAdapterResponse()

    async def PinAdapter(self, request: pb.PinAdapterRequest, context: Context) -> pb.PinAdapterResponse:
        async with _answering(context):
            status = await self._service.adapters.pin(read_adapter_name(request), key_of(context))
            return pb.PinAdapterResponse(adapter=status)

    async def UnpinAdapter(self, request: pb.UnpinAdapterRequest, context: Context) -> pb.UnpinAdapterResponse:
        async with _answering(context):
            status = await self._service.adapters.unpin(read_adapter_name(request), key_of(context))
            return pb.UnpinAdapterResponse(adapter=status)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        async with _answering(context):
            self._service.keys.tenant(key_of(context))
            return self._service.info


class GrpcServer:
    """The gRPC port: the API, health and reflection. Healthy while `set_healthy` says so, until `drain`."""

    def __init__(
        self,
        api: GenerationApi,
        keys: Keys,
        max_message: int,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        """`max_message`: the most bytes of a request. Without `credentials`, it does not speak TLS."""
        self._credentials = credentials
        limits = MessageLimits([API], _answering, keys, max_message)
        keyless = MessageLimits(KEYLESS, _answering, Keys({}), max_message, MAX_WATCHES)
        options = (
            *SERVER_OPTIONS,
            ("grpc.max_receive_message_length", max_message),
            ("grpc.max_allowed_incoming_connections", most_grpc_connections()),
        )
        self._server = grpc.aio.server(options=options, interceptors=(*interceptors, limits, keyless))
        self._health = health.aio.HealthServicer()
        add_GenerationServiceServicer_to_server(api, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> int:
        """Listens; returns the port. Raises OSError if it is taken."""
        try:
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            if self._credentials is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error}") from error
        await self.set_healthy(False)
        await self._server.start()
        return bound

    async def set_healthy(self, healthy: bool) -> None:
        """What health checks are told."""
        states = health_pb2.HealthCheckResponse
        for name in ("", SERVICE):
            await self._health.set(name, states.SERVING if healthy else states.NOT_SERVING)

    async def drain(self) -> None:
        """Takes no more calls: clients that are connected learn it, and connect to another server for the next one.
        Those in progress continue until `stop`."""
        await self._health.enter_graceful_shutdown()
        self._draining = asyncio.create_task(self._server.stop(math.inf))

    async def stop(self, grace: float) -> None:
        """Ends calls in progress after `grace` seconds."""
        await self._server.stop(grace)


@asynccontextmanager
async def _answering(context: Context) -> AsyncIterator[None]:
    """Turns what is raised inside into the call's status."""
    try:
        yield
    except LoraplexError as error:
        await context.abort_with_status(to_status(error))
    except Exception:
        logger.exception("a call failed")
        await context.abort_with_status(to_status(LoraplexError("internal error; the server's log has the details")))


def _read(request: pb.GenerateRequest, context: Context) -> Request:
    left = context.time_remaining()
    return replace(read_request(request), deadline=None if left is None else time.monotonic() + left)
