"""Calls that use the model: generate, embed, classify, tokenize."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar, Unpack

from loraplex import requests, responses
from loraplex.connection import Connection
from loraplex.options import AdapterReference, GenerateOptions, MergedAdapters, Message, ParseOptions, Prompt
from loraplex.structured import ParsedGeneration, ParsedPiece, PieceParser, grammar_of, parsed_generation
from loraplex.tools import AnyTool
from loraplex.types import Classification, Embedding, Generation, ModelInfo, StreamPiece, TokenSpan
from loraplex_protos import generation_pb2 as pb

T = TypeVar("T")


class GenerationCalls(Connection):
    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Returns once all sequences are finished. For the options see `GenerateOptions`."""
        request = requests.generate_request(prompt, **options)
        return responses.generation(await self._send(self._stub.Generate, request, timeout))

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[StreamPiece, None]:
        """Yields the text as it is generated. For the options see `GenerateOptions`.

        The request is sent when the first piece is requested. Leaving the loop cancels it, as does
        `close()`, or `aclose()` with asyncio.
        """
        return self._pieces(requests.generate_request(prompt, **options), timeout)

    async def _pieces(self, request: pb.GenerateRequest, timeout: float | None) -> AsyncGenerator[StreamPiece, None]:
        async with aclosing(self._stream(self._stub.GenerateStream, request, timeout)) as stream:
            async for response in stream:
                yield responses.stream_piece(response)

    async def parse(
        self, prompt: Prompt, kind: type[T], *, timeout: float | None = None, **options: Unpack[ParseOptions]
    ) -> ParsedGeneration[T]:
        """Generates JSON that fits a type, such as a pydantic model or a dataclass, and reads it:
        `parse(prompt, Person).parsed` is a Person.

        The schema constrains the answer, but the prompt should say what is wanted. Raises AnswerError if the answer was
        cut off, or if the type refuses it for a reason that its schema does not have. For the options, see
        `ParseOptions`.
        """
        options.setdefault("reasoning", True)
        generation = await self.generate(prompt, timeout=timeout, grammar=grammar_of(kind), **options)
        return parsed_generation(kind, generation)

    def stream_parsed(
        self, prompt: Prompt, kind: type[T], *, timeout: float | None = None, **options: Unpack[ParseOptions]
    ) -> AsyncGenerator[ParsedPiece[T], None]:
        """Yields the text as it is generated; the last piece of a sequence has the value as `parsed`. Otherwise as
        `parse` and `stream`."""
        options.setdefault("reasoning", True)
        request = requests.generate_request(prompt, grammar=grammar_of(kind), **options)
        return self._parsed_pieces(request, kind, timeout)

    async def _parsed_pieces(
        self, request: pb.GenerateRequest, kind: type[T], timeout: float | None
    ) -> AsyncGenerator[ParsedPiece[T], None]:
        parser = PieceParser(kind)
        async with aclosing(self._pieces(request, timeout)) as pieces:
            async for piece in pieces:
                yield parser.read(piece)

    async def cancel(self, request_id: str, *, timeout: float | None = None) -> None:
        """Ends a request that another call started; its sequences finish with `FinishReason.CANCELLED`.

        Raises RequestNotFoundError if no such request is running.
        """
        await self._send_once(self._stub.CancelGeneration, requests.cancel_request(request_id), timeout)

    async def embed(
        self,
        inputs: str | Sequence[Prompt],
        *,
        adapter: str | AdapterReference | MergedAdapters | None = None,
        session: str = "",
        timeout: float | None = None,
    ) -> tuple[Embedding, ...]:
        """One embedding per input: texts, token ids or conversations, at most 1024."""
        request = requests.embed_request(inputs, adapter, session)
        return responses.embeddings(await self._send(self._stub.Embed, request, timeout))

    async def classify(
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
        return responses.classifications(await self._send(self._stub.Classify, request, timeout))

    async def tokenize(
        self,
        prompt: str | Sequence[Message],
        *,
        tools: Sequence[AnyTool] | None = None,
        skip_special_tokens: bool = False,
        timeout: float | None = None,
    ) -> tuple[TokenSpan, ...]:
        """The tokens of a text, or of a conversation as `generate` would render it with these tools.

        `skip_special_tokens` omits those that the tokenizer adds to a text.
        """
        request = requests.tokenize_request(prompt, skip_special_tokens, tools)
        return responses.token_spans(await self._send(self._stub.Tokenize, request, timeout))

    async def info(self, *, timeout: float | None = None) -> ModelInfo:
        """The server's model and its limits."""
        return responses.model_info(await self._send(self._stub.GetModelInfo, pb.GetModelInfoRequest(), timeout))
