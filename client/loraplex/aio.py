"""The client for asyncio: `loraplex.client` with awaitable calls."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc
import grpc.aio

from loraplex import requests, responses
from loraplex.connection import CHANNEL_OPTIONS, check_address, key_metadata, typed_errors
from loraplex.types import (
    Adapter,
    AdapterReference,
    Classification,
    Embedding,
    GenerateOptions,
    Generation,
    MergedAdapters,
    Message,
    ModelInfo,
    Prompt,
    StreamPiece,
    TokenSpan,
)
from loraplex_protos import generation_pb2 as pb
from loraplex_protos.generation_pb2_grpc import GenerationServiceStub


class AsyncClient:
    """`Client` for asyncio: the same methods, but awaitable.

        async with AsyncClient("localhost:50051") as client:
            print((await client.generate("The capital of France is", max_new_tokens=8)).text)
            async for piece in client.stream([{"role": "user", "content": "Hi"}], adapter="sql"):
                print(piece.text, end="")

    Cancelling the task that waits for a call cancels the call on the server.
    """

    def __init__(
        self,
        server: str = "localhost:50051",
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """`server` is host:port; `api_key` is for a server with keys; `credentials` (`grpc.ssl_channel_credentials()`,
        for example) turn TLS on. Raises ValueError if `server` is a URL."""
        self._server = check_address(server)
        self._metadata = key_metadata(api_key)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(server, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(server, credentials, options=CHANNEL_OPTIONS)
        self._stub = GenerationServiceStub(self._channel)

    async def close(self) -> None:
        """Closes the connection, which ends the calls in progress."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """See `Client.generate`."""
        request = requests.generate_request(prompt, **options)
        with typed_errors(self._server):
            return responses.generation(await self._stub.Generate(request, timeout=timeout, metadata=self._metadata))

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[StreamPiece, None]:
        """See `Client.stream`; use `aclose()` instead of `close()`."""
        return self._pieces(requests.generate_request(prompt, **options), timeout)

    async def _pieces(self, request: pb.GenerateRequest, timeout: float | None) -> AsyncGenerator[StreamPiece, None]:
        with typed_errors(self._server):
            call = self._stub.GenerateStream(request, timeout=timeout, metadata=self._metadata)
            try:
                async for response in call:
                    yield responses.stream_piece(response)
            finally:
                call.cancel()

    async def cancel(self, request_id: str, *, timeout: float | None = None) -> None:
        """See `Client.cancel`."""
        with typed_errors(self._server):
            await self._stub.CancelGeneration(
                requests.cancel_request(request_id), timeout=timeout, metadata=self._metadata
            )

    async def embed(
        self,
        inputs: str | Sequence[Prompt],
        *,
        adapter: str | AdapterReference | MergedAdapters | None = None,
        session: str = "",
        timeout: float | None = None,
    ) -> tuple[Embedding, ...]:
        """See `Client.embed`."""
        request = requests.embed_request(inputs, adapter, session)
        with typed_errors(self._server):
            return responses.embeddings(await self._stub.Embed(request, timeout=timeout, metadata=self._metadata))

    async def classify(
        self,
        inputs: str | Sequence[Prompt],
        *,
        adapter: str | AdapterReference | MergedAdapters | None = None,
        session: str = "",
        raw_logits: bool = False,
        timeout: float | None = None,
    ) -> tuple[Classification, ...]:
        """See `Client.classify`."""
        request = requests.classify_request(inputs, adapter, raw_logits, session)
        with typed_errors(self._server):
            answer = await self._stub.Classify(request, timeout=timeout, metadata=self._metadata)
            return responses.classifications(answer)

    async def tokenize(
        self,
        prompt: str | Sequence[Message],
        *,
        skip_special_tokens: bool = False,
        timeout: float | None = None,
    ) -> tuple[TokenSpan, ...]:
        """See `Client.tokenize`."""
        with typed_errors(self._server):
            request = requests.tokenize_request(prompt, skip_special_tokens)
            return responses.token_spans(await self._stub.Tokenize(request, timeout=timeout, metadata=self._metadata))

    async def adapters(self, *, timeout: float | None = None) -> tuple[Adapter, ...]:
        """See `Client.adapters`."""
        with typed_errors(self._server):
            request, found = pb.ListAdaptersRequest(page_size=requests.ADAPTERS_AT_A_TIME), list[Adapter]()
            while True:
                page = await self._stub.ListAdapters(request, timeout=timeout, metadata=self._metadata)
                found += map(responses.adapter, page.adapters)
                if not page.next_page_token:
                    return tuple(found)
                request.page_token = page.next_page_token

    async def load_adapter(
        self, id: str, *, source: str = "", revision: str = "", token: str = "", timeout: float | None = None
    ) -> Adapter:
        """See `Client.load_adapter`."""
        reference = requests.adapter_reference(AdapterReference(id, source, revision, token))
        with typed_errors(self._server):
            response = await self._stub.LoadAdapter(
                pb.LoadAdapterRequest(adapter=reference), timeout=timeout, metadata=self._metadata
            )
            return responses.adapter(response.adapter)

    async def upload_adapter(
        self,
        name: str,
        files: Mapping[str, bytes],
        *,
        expected_version: int | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Uploads an adapter's files, by name: adapter_config.json, adapter_model.safetensors, and what belongs to it.
        The server keeps them in memory, as the newest version of the name; sequences that run keep the version before.

        Raises AdapterInvalidError, or AdapterConflictError if the name has not `expected_version` (0: none).
        """
        parts = requests.upload_parts(name, files, expected_version)
        with typed_errors(self._server):
            response = await self._stub.UploadAdapter(parts, timeout=timeout, metadata=self._metadata)
            return responses.adapter(response.adapter)

    async def register_adapter(
        self,
        name: str,
        id: str,
        *,
        source: str = "",
        revision: str = "",
        token: str = "",
        expected_version: int | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Makes an adapter the newest version of a name in the server's registry file, with its source, commit and
        content as they are now. The token is not kept.

        Raises AdapterConflictError if the name has not `expected_version` (0: none), ForbiddenError if the file cannot
        be written.
        """
        reference = requests.adapter_reference(AdapterReference(id, source, revision, token))
        request = pb.RegisterAdapterRequest(name=name, adapter=reference, expected_version=expected_version)
        with typed_errors(self._server):
            response = await self._stub.RegisterAdapter(request, timeout=timeout, metadata=self._metadata)
            return responses.adapter(response.adapter)

    async def set_alias(
        self,
        name: str,
        targets: Mapping[str, float],
        *,
        expected: Mapping[str, float] | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Makes a name in the server's registry file stand for other names or versions, with shares that are together
        100 per cent. Raises AdapterConflictError if it does not stand for `expected` (empty: nothing)."""
        request = requests.alias_request(name, targets, expected)
        with typed_errors(self._server):
            response = await self._stub.SetAlias(request, timeout=timeout, metadata=self._metadata)
            return responses.adapter(response.adapter)

    async def remove_adapter(
        self, name: str, *, expected_version: int | None = None, timeout: float | None = None
    ) -> None:
        """Removes an uploaded adapter's name, or from the registry file a name, an alias, or a version (name@version)
        other than the newest. Sequences that use it run to their end."""
        request = pb.RemoveAdapterRequest(name=name, expected_version=expected_version)
        with typed_errors(self._server):
            await self._stub.RemoveAdapter(request, timeout=timeout, metadata=self._metadata)

    async def unload_adapter(
        self,
        id: str = "",
        *,
        source: str = "",
        revision: str = "",
        digest: str = "",
        wait: bool = False,
        timeout: float | None = None,
    ) -> None:
        """See `Client.unload_adapter`."""
        request = pb.UnloadAdapterRequest(wait=wait)
        requests.name_adapter(request, AdapterReference(id, source, revision), digest)
        with typed_errors(self._server):
            await self._stub.UnloadAdapter(request, timeout=timeout, metadata=self._metadata)

    async def pin_adapter(
        self,
        id: str = "",
        *,
        source: str = "",
        revision: str = "",
        token: str = "",
        digest: str = "",
        timeout: float | None = None,
    ) -> Adapter:
        """See `Client.pin_adapter`."""
        reference = AdapterReference(id, source, revision, token)
        request = requests.name_adapter(pb.PinAdapterRequest(), reference, digest)
        with typed_errors(self._server):
            response = await self._stub.PinAdapter(request, timeout=timeout, metadata=self._metadata)
            return responses.adapter(response.adapter)

    async def unpin_adapter(
        self,
        id: str = "",
        *,
        source: str = "",
        revision: str = "",
        digest: str = "",
        timeout: float | None = None,
    ) -> Adapter:
        """See `Client.unpin_adapter`."""
        request = requests.name_adapter(pb.UnpinAdapterRequest(), AdapterReference(id, source, revision), digest)
        with typed_errors(self._server):
            response = await self._stub.UnpinAdapter(request, timeout=timeout, metadata=self._metadata)
            return responses.adapter(response.adapter)

    async def info(self, *, timeout: float | None = None) -> ModelInfo:
        """See `Client.info`."""
        with typed_errors(self._server):
            return responses.model_info(
                await self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout, metadata=self._metadata)
            )
