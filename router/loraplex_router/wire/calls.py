"""Calls to ranks: typed errors, health checks, and consistency checks of their answers."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.errors import DeadlineError, UnavailableError, from_rpc_error
from loraplex_protos.protocol import PROTOCOL_VERSION

CONNECTION_CLOSED = "the connection was closed"
ANSWER_SECONDS = 5.0  # for what needs no computation
LONG_ANSWER_SECONDS = 60.0  # for what gives gigabytes of memory back, or has megabytes

T = TypeVar("T")


def agree(infos: Sequence[pb.GetInfoResponse]) -> pb.GetInfoResponse:
    """One description of the replica, with the block count and the adapters' memory of its smallest rank."""
    for rank, info in enumerate(infos):
        if info.protocol_version != PROTOCOL_VERSION:
            older = "the shards" if info.protocol_version < PROTOCOL_VERSION else "the router"
            raise UnavailableError(
                f"rank {rank} has version {info.protocol_version} of the protocol between router and shards, this "
                f"router has version {PROTOCOL_VERSION}: upgrade {older}"
            )
        if (info.rank, info.tensor_parallel_size) != (rank, len(infos)):
            place = f"rank {info.rank} of {info.tensor_parallel_size}"
            raise UnavailableError(f"address {rank + 1} of {len(infos)} of the replica answers as {place}")
        if info.driven:
            raise UnavailableError("another router is driving it")
        if (info.model_id, info.max_model_len) != (infos[0].model_id, infos[0].max_model_len):
            raise UnavailableError(f"rank {rank} serves {info.model_id!r}, rank 0 {infos[0].model_id!r}")
    agreed = pb.GetInfoResponse()
    agreed.CopyFrom(infos[0])
    agreed.num_blocks = min(info.num_blocks for info in infos)
    agreed.adapter_host_bytes = min(info.adapter_host_bytes for info in infos)
    agreed.longest_step_us = max(info.longest_step_us for info in infos)
    agreed.adapter_device_bytes = min(info.adapter_device_bytes for info in infos)
    return agreed


async def check_health(channel: grpc.aio.Channel) -> None:
    """Raises UnavailableError if the rank is stopping, or does not answer."""
    stub: Any = HealthStub(channel)
    answer = await within(ANSWER_SECONDS, stub.Check, HealthCheckRequest())
    if answer.status != HealthCheckResponse.SERVING:
        raise UnavailableError("it is stopping")


async def watch_health(channel: grpc.aio.Channel) -> None:
    """Returns once the rank is stopping."""
    stub: Any = HealthStub(channel)
    watch = stub.Watch(HealthCheckRequest())
    try:
        while (answer := await watch.read()) is not grpc.aio.EOF:
            if answer.status != HealthCheckResponse.SERVING:
                return
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
    finally:
        watch.cancel()
    raise UnavailableError("a rank ended its health stream")


async def within(seconds: float, call: Callable[..., Awaitable[T]], request: object) -> T:
    """The answer to a call. Raises UnavailableError if it does not come in time."""
    try:
        return await typed(call(request, timeout=seconds))
    except DeadlineError as error:
        raise UnavailableError(f"it has not answered for {seconds:g} s") from error


async def typed(call: Awaitable[T]) -> T:
    """The call's answer. Raises errors as LoraplexError."""
    try:
        return await call
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise UnavailableError(CONNECTION_CLOSED) from None  # during the call, by `close`
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None  # the call's repr may show its metadata
    except asyncio.InvalidStateError as error:  # a write to a stream that the other side has ended
        raise UnavailableError("the step stream is closed") from error


async def all_of(calls: Iterable[Awaitable[T]]) -> list[T]:
    """The answers to calls that were made to several ranks. Raises an error as `settled` returns it."""
    answers, error = await settled(calls)
    if error is not None:
        raise error
    return answers


async def settled(calls: Iterable[Awaitable[T]]) -> tuple[list[T], BaseException | None]:
    """The answers of those ranks that do what they were called for, and an error of the others, if any: that of a rank
    that is gone rather than another one. Returns only after all have answered, since what a rank still does would meet
    the next call there."""
    outcomes = await asyncio.gather(*map(typed, calls), return_exceptions=True)
    answers = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    return answers, min(errors, key=lambda error: not isinstance(error, UnavailableError), default=None)
