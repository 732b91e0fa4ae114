"""The client for ordinary code; `loraplex.aio` has the one for asyncio."""

from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

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


class Client:
    """A connection to a loraplex server; safe to share between threads.

        with Client("localhost:50051") as client:
            print(client.generate("The capital of France is", max_new_tokens=8).text)
            for piece in client.stream([{"role": "user", "content": "Hi"}], adapter="sql"):
                print(piece.text, end="")

    All calls take `timeout`, in seconds, and raise `LoraplexError`s: `UnavailableError` if no server answers,
    `DeadlineError` after the timeout, `InvalidRequestError` for an invalid request. If the server is unavailable, calls
    that change nothing are retried a few times, unless the answer has begun.
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
            self._channel = grpc.insecure_channel(server, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(server, credentials, options=CHANNEL_OPTIONS)
        self._stub = GenerationServiceStub(self._channel)

    def close(self) -> None:
        """Closes the connection, which ends the calls in progress."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Returns once all sequences are finished. For the options see `GenerateOptions`."""
        request = requests.generate_request(prompt, **options)
        with typed_errors(self._server):
            return responses.generation(self._stub.Generate(request, timeout=timeout, metadata=self._metadata))

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[StreamPiece, None, None]:
        """Yields the text as it is generated. For the options see `GenerateOptions`.

        The request is sent when the first piece is requested. Leaving the loop, or `close()`, cancels it.
        """
        return self._pieces(requests.generate_request(prompt, **options), timeout)

    def _pieces(self, request: pb.GenerateRequest, timeout: float | None) -> Generator[StreamPiece, None, None]:
        with typed_errors(self._server):
            call = self._stub.GenerateStream(request, timeout=timeout, metadata=self._metadata)
            try:
                for response in call:
                    yield responses.stream_piece(response)
            finally:
                call.cancel()

    def cancel(self, request_id: str, *, timeout: float | None = None) -> None:
        """Ends a request that another call started; its sequences finish with `FinishReason.CANCELLED`.

        Raises RequestNotFoundError if no such request is running.
        """
        with typed_errors(self._server):
            self._stub.CancelGeneration(requests.cancel_request(request_id), timeout=timeout, metadata=self._metadata)

    def embed(
        self,
        inputs: str | Sequence[Prompt],
        *,
        adapter: str | AdapterReference | MergedAdapters | None = None,
        session: str = "",
        timeout: float | None = None,
    ) -> tuple[Embedding, ...]:
        """One embedding per input: texts, token ids or conversations, at most 1024."""
        request = requests.embed_request(inputs, adapter, session)
        with typed_errors(self._server):
            return responses.embeddings(self._stub.Embed(request, timeout=timeout, metadata=self._metadata))

    def classify(
        self,
        inputs: str | Sequence[Prompt],
        *,
        adapter: str | AdapterReference | MergedAdapters | None = None,
        session: str = "",
        raw_logits: bool = False,
        timeout: float | None = None,
    ) -> tuple[Classification, ...]:
        """The labels that the model's or the adapter's classifier gives to each input, or to each token of it, with
        their scores: texts, token ids or conversations, at most 1024.

        With `raw_logits` the scores are the classifier's logits. Raises InvalidRequestError if there is no classifier.
        """
        request = requests.classify_request(inputs, adapter, raw_logits, session)
        with typed_errors(self._server):
            answer = self._stub.Classify(request, timeout=timeout, metadata=self._metadata)
            return responses.classifications(answer)

    def tokenize(
        self,
        prompt: str | Sequence[Message],
        *,
        skip_special_tokens: bool = False,
        timeout: float | None = None,
    ) -> tuple[TokenSpan, ...]:
        """The tokens of a text, or of a conversation as `generate` would render it.

        `skip_special_tokens` omits those that the tokenizer adds to a text.
        """
        with typed_errors(self._server):
            request = requests.tokenize_request(prompt, skip_special_tokens)
            return responses.token_spans(self._stub.Tokenize(request, timeout=timeout, metadata=self._metadata))

    def adapters(self, *, timeout: float | None = None) -> tuple[Adapter, ...]:
        """The loaded adapters, and those in the server's adapter directory, sorted by id. `timeout` is for each
        thousand of them."""
        with typed_errors(self._server):
            request, found = pb.ListAdaptersRequest(page_size=requests.ADAPTERS_AT_A_TIME), list[Adapter]()
            while True:
                page = self._stub.ListAdapters(request, timeout=timeout, metadata=self._metadata)
                found += map(responses.adapter, page.adapters)
                if not page.next_page_token:
                    return tuple(found)
                request.page_token = page.next_page_token

    def load_adapter(
        self, id: str, *, source: str = "", revision: str = "", token: str = "", timeout: float | None = None
    ) -> Adapter:
        """Fetches and checks an adapter before its first request needs it. For the arguments see `AdapterReference`.

        Loading an adapter again rereads its source: if the content changed, later requests use the new content. Raises
        AdapterNotFoundError, AdapterForbiddenError, AdapterInvalidError or AdapterSourceError.
        """
        reference = requests.adapter_reference(AdapterReference(id, source, revision, token))
        with typed_errors(self._server):
            response = self._stub.LoadAdapter(
                pb.LoadAdapterRequest(adapter=reference), timeout=timeout, metadata=self._metadata
            )
            return responses.adapter(response.adapter)

    def upload_adapter(
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
            response = self._stub.UploadAdapter(parts, timeout=timeout, metadata=self._metadata)
            return responses.adapter(response.adapter)

    def register_adapter(
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
            response = self._stub.RegisterAdapter(request, timeout=timeout, metadata=self._metadata)
            return responses.adapter(response.adapter)

    def set_alias(
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
            response = self._stub.SetAlias(request, timeout=timeout, metadata=self._metadata)
            return responses.adapter(response.adapter)

    def remove_adapter(self, name: str, *, expected_version: int | None = None, timeout: float | None = None) -> None:
        """Removes an uploaded adapter's name, or from the registry file a name, an alias, or a version (name@version)
        other than the newest. Sequences that use it run to their end."""
        request = pb.RemoveAdapterRequest(name=name, expected_version=expected_version)
        with typed_errors(self._server):
            self._stub.RemoveAdapter(request, timeout=timeout, metadata=self._metadata)

    def unload_adapter(
        self,
        id: str = "",
        *,
        source: str = "",
        revision: str = "",
        digest: str = "",
        wait: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Frees an adapter's memory on the device and on the host. Give its id or its digest; merged adapters only have
        a digest.

        With `wait`, waits until the sequences that need it have ended; otherwise raises AdapterInUseError if there are
        any.
        """
        request = pb.UnloadAdapterRequest(wait=wait)
        requests.name_adapter(request, AdapterReference(id, source, revision), digest)
        with typed_errors(self._server):
            self._stub.UnloadAdapter(request, timeout=timeout, metadata=self._metadata)

    def pin_adapter(
        self,
        id: str = "",
        *,
        source: str = "",
        revision: str = "",
        token: str = "",
        digest: str = "",
        timeout: float | None = None,
    ) -> Adapter:
        """Loads an adapter onto one replica's device, where it stays until it is unpinned or unloaded. Returns once it
        is there. A pin by `digest` needs a loaded adapter, and is lost with its replica.

        Raises AdapterPinsError if no slot would be left for other adapters, and the errors of `load_adapter`.
        """
        reference = AdapterReference(id, source, revision, token)
        request = requests.name_adapter(pb.PinAdapterRequest(), reference, digest)
        with typed_errors(self._server):
            response = self._stub.PinAdapter(request, timeout=timeout, metadata=self._metadata)
            return responses.adapter(response.adapter)

    def unpin_adapter(
        self,
        id: str = "",
        *,
        source: str = "",
        revision: str = "",
        digest: str = "",
        timeout: float | None = None,
    ) -> Adapter:
        """Lets an adapter leave the device when others need its slot."""
        request = requests.name_adapter(pb.UnpinAdapterRequest(), AdapterReference(id, source, revision), digest)
        with typed_errors(self._server):
            response = self._stub.UnpinAdapter(request, timeout=timeout, metadata=self._metadata)
            return responses.adapter(response.adapter)

    def info(self, *, timeout: float | None = None) -> ModelInfo:
        """The server's model and its limits."""
        with typed_errors(self._server):
            return responses.model_info(
                self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout, metadata=self._metadata)
            )
