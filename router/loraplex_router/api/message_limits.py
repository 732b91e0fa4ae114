"""Limits gRPC requests: who may send one, how long it takes, the size of all together, and the parts of each before it
is parsed: a part of two bytes takes fifty times as much memory in a message, and parsing millions of parts delays all
streams."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from inspect import isasyncgenfunction
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from loraplex_protos.errors import (
    DeadlineError,
    FieldViolation,
    InvalidRequestError,
    OverloadedError,
    RequestCancelledError,
)
from loraplex_router.access.keys import Keys, read_bearer
from loraplex_router.access.room import FULL, Holding, Room
from loraplex_router.access.tenant import Tenant
from loraplex_router.api.sending import READ_SECONDS, Sender
from loraplex_router.api.uploads import read_rest
from loraplex_router.text.json_limits import LONG

QUICK_SECONDS = 1.0  # in which nearly all messages arrive; nobody can tell how much of another one is in memory
MESSAGE_SECONDS = 60.0  # for the others
MOST_MESSAGES = 8  # of the largest size that may be in memory together; smaller ones are as many more
MAX_FIELDS = 2**14  # set in a request and in all parts of it; a list of numbers is one
MAX_NUMBERS = 2**19  # bytes of all lists of numbers: 175,000 token ids at least
TEXTS = FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES
VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5  # kinds of values on the wire

Context = grpc.aio.ServicerContext[Any, Any]
Messages = AsyncIterator[bytes]
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
    """Reads and parses services' requests within `answering`, where errors can be answered. Nothing is read of
    callers without a key, where one is needed. A message is refused if there is no room for it until its request is
    answered; one that takes long to arrive, if there is none for as much as it may become."""

    def __init__(
        self,
        services: Iterable[ServiceDescriptor],
        answering: Answering,
        keys: Keys,
        most: int,
        most_streams: float = math.inf,
    ) -> None:
        """`most`: the most bytes of a message; `most_streams`: the most calls at a time that have one request and many
        answers."""
        self._streams, self._most_streams = 0, most_streams
        self._room, self._arriving = (Room(MOST_MESSAGES * most, keys) for _ in range(2))
        self._most = most
        self._keys = keys
        methods = [method for service in services for method in service.methods]
        self._kinds = {f"/{each.containing_service.full_name}/{each.name}": each.input_type for each in methods}
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

        async def unary(messages: Messages, context: Context) -> Any:
            async with self._request(messages, kind, context) as request:
                return await handler.unary_unary(request, context)

        async def stream(messages: Messages, context: Context) -> None:
            async with self._request(messages, kind, context) as request, self._streaming(context):
                if not isasyncgenfunction(handler.unary_stream):  # it sends what it has itself
                    await handler.unary_stream(request, context)
                elif not await Sender(handler.unary_stream(request, context), context).send_all():
                    async with self._answering(context):
                        raise RequestCancelledError(f"the client has read nothing for {READ_SECONDS:g} seconds")

        async def collect(messages: Messages, context: Context) -> Any:
            async def parsed() -> AsyncIterator[Any]:  # within the handler, which answers errors
                async with read_rest(messages):
                    async for data in messages:
                        with self._room.holding(tenant) as holding:
                            yield await _parse(data, kind, holding)

            async with self._answering(context):
                tenant = self._tenant(context)
            return await handler.stream_unary(parsed(), context)

        async def converse(messages: Messages, context: Context) -> None:
            async def parsed() -> AsyncIterator[Any]:
                while (data := await self._receive(messages, tenant)) is not None:
                    with self._room.holding(tenant) as holding:
                        yield await _parse(data, kind, holding)

            async with self._answering(context):
                tenant = self._tenant(context)
                async for answer in handler.stream_stream(parsed(), context):
                    await context.write(answer)

        # gRPC would read all of a request that is not a stream before anybody is asked whether it may come.
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(converse, None, handler.response_serializer)
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(collect, None, handler.response_serializer)
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(unary, None, handler.response_serializer)

    @asynccontextmanager
    async def _request(self, messages: Messages, kind: Descriptor, context: Context) -> AsyncIterator[Any]:
        """The only message of a call."""
        async with self._answering(context):
            tenant = self._tenant(context)
            data = await self._receive(messages, tenant)
            if data is None:
                raise InvalidRequestError(FieldViolation("request", "is missing"))
        with self._room.holding(tenant) as holding:
            async with self._answering(context):
                request = await _parse(data, kind, holding)
            yield request

    @asynccontextmanager
    async def _streaming(self, context: Context) -> AsyncIterator[None]:
        if self._streams >= self._most_streams:
            async with self._answering(context):
                raise OverloadedError(f"at most {self._most_streams} such calls can be open: try again later")
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    async def _receive(self, messages: Messages, tenant: Tenant) -> bytes | None:
        """The next message; None at the end."""
        receiving = asyncio.ensure_future(anext(aiter(messages), None))
        try:
            await asyncio.wait([receiving], timeout=QUICK_SECONDS)
            if not receiving.done():
                with self._arriving.holding(tenant) as holding:
                    if not holding.take(self._most):
                        raise OverloadedError(FULL)
                    await asyncio.wait([receiving], timeout=MESSAGE_SECONDS)
            if not receiving.done():
                raise DeadlineError(f"the request was not complete after {MESSAGE_SECONDS:g} seconds")
            return receiving.result()
        finally:
            receiving.cancel()

    def _tenant(self, context: Context) -> Tenant:
        return self._keys.tenant(key_of(context))


async def _parse(data: bytes, kind: Descriptor, holding: Holding) -> Any:
    if not holding.take(len(data)):
        raise OverloadedError(FULL)
    return await asyncio.to_thread(parse_message, data, kind) if len(data) > LONG else parse_message(data, kind)


def key_of(context: Context) -> str | None:
    """The API key that the caller sent."""
    headers = dict(context.invocation_metadata() or ())
    value = headers.get("authorization")
    return read_bearer(value) if isinstance(value, str) else None
