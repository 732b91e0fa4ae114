"""Odd requests over gRPC: messages with odd values, and bytes that are nearly messages."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from random import Random
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from loraplex_protos import generation_pb2 as pb
from tests.fuzz.odd import SCALARS

ANSWER_SECONDS = 120
SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"]
NUMBERS = 0, 1, 2, 3, 7, 100, 2**31 - 1
FLOATS = 0.0, 0.5, 1.0, -1.0, 1e30, float("nan"), float("inf")
TEXTS = ["red", *(text for text in SCALARS if isinstance(text, str) and text != "\ud800")]
WRONG = grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.DEADLINE_EXCEEDED


@dataclass(frozen=True)
class GrpcRequest:
    """`patience`: how many seconds the client waits for the answer."""

    method: MethodDescriptor
    messages: tuple[bytes, ...]
    patience: float = ANSWER_SECONDS

    def __str__(self) -> str:
        return f"{self.method.name} {self.messages!r:.1500}"


def odd_message(dice: Random) -> GrpcRequest:
    method = dice.choice(SERVICE.methods)
    messages = tuple(odd_content(method, dice) for _ in range(dice.choice((1, 2, 5)) if method.client_streaming else 1))
    if method.input_type.name == "GenerateRequest" and waits(messages[0]):
        return GrpcRequest(method, messages, patience=dice.uniform(0, 1))
    return GrpcRequest(method, messages)


def waits(content: bytes) -> bool:
    """Whether it is computed in the background: while there is a canary, never."""
    try:
        return bool(pb.GenerateRequest.FromString(content).background)
    except DecodeError:
        return False


def odd_content(method: MethodDescriptor, dice: Random) -> bytes:
    message = GetMessageClass(method.input_type)()
    fill(message, dice)
    if isinstance(message, pb.GenerateRequest) and dice.random() < 0.9:
        message.text, message.stopping.max_new_tokens = "Hi", 2
    content = message.SerializeToString()
    if content and dice.random() < 0.15:
        place = dice.randrange(len(content))
        content = content[:place] + dice.randbytes(dice.randrange(4)) + content[place + dice.randrange(3) :]
    return content


def fill(message: Message, dice: Random, depth: int = 0) -> None:
    """Sets some of the fields."""
    left_out = dice.choice((0.3, 0.6, 0.9))
    for field in message.DESCRIPTOR.fields:
        if depth > 4 or dice.random() < left_out:
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            continue
        if field.is_repeated:
            count = dice.choice((1, 1, 2, 20, 500)) if not field.message_type else dice.choice((1, 2, 20))
            for _ in range(count):
                if field.message_type:
                    fill(getattr(message, field.name).add(), dice, depth + 1)
                else:
                    getattr(message, field.name).append(value(field, dice))
        elif field.message_type:
            getattr(message, field.name).SetInParent()
            fill(getattr(message, field.name), dice, depth + 1)
        else:
            setattr(message, field.name, value(field, dice))


def value(field: FieldDescriptor, dice: Random) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return dice.choice(TEXTS) if field.type == FieldDescriptor.TYPE_STRING else dice.randbytes(20)
        case FieldDescriptor.CPPTYPE_BOOL:
            return dice.random() < 0.5
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return dice.choice(FLOATS)
        case _:
            return dice.choice(NUMBERS)


async def call(channel: grpc.aio.Channel, request: GrpcRequest) -> tuple[str, str]:
    """Sends it, and returns the status and what is wrong with it."""
    method = request.method
    path = f"/{SERVICE.full_name}/{method.name}"
    try:
        if method.client_streaming:
            await channel.stream_unary(path)(_each(request.messages), timeout=request.patience)
        elif method.server_streaming:
            async for _ in channel.unary_stream(path)(request.messages[0], timeout=request.patience):
                pass
        else:
            await channel.unary_unary(path)(request.messages[0], timeout=request.patience)
    except grpc.aio.AioRpcError as error:
        late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and request.patience < ANSWER_SECONDS
        wrong = error.code() in WRONG and not late
        return error.code().name, f"{error.code().name}: {error.details()}" if wrong else ""
    return "OK", ""


async def _each(messages: tuple[bytes, ...]) -> AsyncIterator[bytes]:
    for content in messages:
        yield content
