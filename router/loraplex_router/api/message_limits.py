"""Checks gRPC requests before they are parsed: a part of two bytes takes fifty times as much memory in a message, and
parsing millions of parts delays all streams."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from loraplex_protos.errors import FieldViolation, InvalidRequestError, OverloadedError, RequestCancelledError
from loraplex_router.api.sending import READ_SECONDS, Sender
from loraplex_router.api.uploads import read_rest
from loraplex_router.text.json_limits import LONG

MAX_FIELDS = 2**14  # set in a request and in all parts of it; a list of numbers is one
MAX_NUMBERS = 2**19  # bytes of all lists of numbers: 175,000 token ids at least
TEXTS = FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES
VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5  # kinds of values on the wire

Context = grpc.aio.ServicerContext[Any, Any]
Answering = Callable[[Context], AbstractAsyncContextManager[None]]


def check_message(data: bytes, kind: Descriptor) -> None:
    """Raises InvalidRequestError if a message of this kind has too many parts. Data that is not a message passes."""
    fields, numbers, parts = 0, 0, [(0, len(data), kind)]
    try:
        while parts:
            at, end, kind = parts.pop()
            while at < end:
                fields += 1
                if fields > MAX_FIELDS:
                    raise InvalidRequestError(FieldViolation("request", f"has more than {MAX_FIELDS} parts"))
                key, at = _varint(data, at)
                value, begin = _varint(data, at) if key & 7 in (VARINT, DELIMITED) else (0, at)
                at = begin + {VARINT: 0, FIXED64: 8, DELIMITED: value, FIXED32: 4}[key & 7]
                if at > end:  # cut short: the parser reports it
                    return
                field = kind.fields_by_number.get(key >> 3)
                if key & 7 != DELIMITED or field is None:
                    continue
                if field.message_type is not None:
                    parts.append((begin, at, field.message_type))
                elif field.type not in TEXTS:
                    numbers += value
                    if numbers > MAX_NUMBERS:
                        raise InvalidRequestError(FieldViolation("request", "has too many token ids"))
    except (IndexError, KeyError):  # the parser reports it
        return


def parse_message(data: bytes, kind: Descriptor) -> Any:
    """The message. Raises InvalidRequestError, as `check_message` does, or if it is not one of this kind."""
    check_message(data, kind)
    try:
        return GetMessageClass(kind).FromString(data)
    except DecodeError as error:
        raise InvalidRequestError(FieldViolation("request", "cannot be read")) from error


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and the position after it."""
    value = shift = 0
    while (byte := data[at]) & 0x80:
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
    return value | byte << shift, at + 1


class MessageLimits(grpc.aio.ServerInterceptor):
    """Parses a service's requests within `answering`, where errors can be answered. The requests in progress may have
    `together` bytes in all; beyond that, requests are refused."""

    def __init__(self, service: ServiceDescriptor, answering: Answering, together: int) -> None:
        self._room = together
        self._kinds = {f"/{service.full_name}/{method.name}": method.input_type for method in service.methods}
        self._answering = answering

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        kind = self._kinds.get(handler_call_details.method)
        if handler is None or kind is None:
            return handler

        async def unary(data: bytes, context: Context) -> Any:
            with self._held(data):
                return await handler.unary_unary(await self._read(data, kind, context), context)

        async def stream(data: bytes, context: Context) -> None:
            with self._held(data):
                answers = handler.unary_stream(await self._read(data, kind, context), context)
                if not await Sender(answers, context).send_all():
                    async with self._answering(context):
                        raise RequestCancelledError(f"the client has read nothing for {READ_SECONDS:g} seconds")

        async def collect(messages: AsyncIterator[bytes], context: Context) -> Any:
            async def parsed() -> AsyncIterator[Any]:  # within the handler, which answers errors
                async with read_rest(messages):
                    async for data in messages:
                        with self._held(data):
                            yield await self._parse(data, kind)

            return await handler.stream_unary(parsed(), context)

        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(collect, None, handler.response_serializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)

    async def _read(self, data: bytes, kind: Descriptor, context: Context) -> Any:
        async with self._answering(context):
            return await self._parse(data, kind)

    async def _parse(self, data: bytes, kind: Descriptor) -> Any:
        if self._room < 0:
            raise OverloadedError("other requests are large: try again later")
        return await asyncio.to_thread(parse_message, data, kind) if len(data) > LONG else parse_message(data, kind)

    @contextmanager
    def _held(self, data: bytes) -> Iterator[None]:
        self._room -= len(data)
        try:
            yield
        finally:
            self._room += len(data)
