"""Runs coroutines without an event loop.

A coroutine only gives control away when what it awaits does. Over a `BlockingChannel`, whose calls block the thread
instead, it never does, so that its first step is also its last. This is how `Client` has the methods of `AsyncClient`
without a second copy of them.
"""

import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, cast

import grpc
import grpc.aio

MOST_THREADS = 32  # for calls that run at the same time

P = ParamSpec("P")
C = TypeVar("C", covariant=True)
T = TypeVar("T")


class Blocking(Generic[C]):
    """What has blocking methods in place of the coroutines of a `C`."""

    def __init__(self, coroutines: C) -> None:
        self._coroutines = coroutines


def blocking(method: Callable[Concatenate[C, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[Blocking[C], P], T]:
    """The method with the same parameters that returns the coroutine's result."""

    @wraps(method)
    def call(self: Blocking[C], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return run(method(self._coroutines, *args, **kwargs))

    return call


def blocking_stream(
    method: Callable[Concatenate[C, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Blocking[C], P], Generator[T, None, None]]:
    """The method with the same parameters that yields what the asynchronous generator yields."""

    @wraps(method)
    def call(self: Blocking[C], /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        return _each(method(self._coroutines, *args, **kwargs))

    return call


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Its result. It must never suspend."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return cast(T, end.value)
    raise RuntimeError("a blocking call was suspended")


class CallingThread:
    """Waits by blocking the thread that calls."""

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def all_of(self, calls: Sequence[Callable[[], object]]) -> list[object]:
        """One call runs in this thread, several in threads of their own."""
        if len(calls) == 1:
            return [_result(calls[0])]
        with ThreadPoolExecutor(min(len(calls), MOST_THREADS)) as threads:
            running = [threads.submit(copy_context().run, _result, call) for call in calls]
            return [each.result() for each in running]


def _result(call: Callable[[], object]) -> object:
    try:
        return call()
    except Exception as error:
        return error


def _each(items: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    try:
        while True:
            try:
                item = run(anext(items))
            except StopAsyncIteration:
                return
            yield item
    finally:
        run(items.aclose())


class BlockingChannel:
    """A grpc.Channel in the shape of a grpc.aio.Channel, for a stub."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def unary_unary(self, method: str, **options: Any) -> Callable[..., Coroutine[Any, Any, Any]]:
        return _awaitable(self._channel.unary_unary(method, **options))

    def stream_unary(self, method: str, **options: Any) -> Callable[..., Coroutine[Any, Any, Any]]:
        return _awaitable(self._channel.stream_unary(method, **options))

    def unary_stream(self, method: str, **options: Any) -> Callable[..., "_Stream[Any]"]:
        multicallable = self._channel.unary_stream(method, **options)
        return lambda *args, **kwargs: _Stream(multicallable(*args, **kwargs))

    async def close(self) -> None:
        self._channel.close()


def _awaitable(call: Callable[..., Any]) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def send(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return send


class _Stream(Generic[T]):
    """A call whose answers are read with `async for`."""

    def __init__(self, call: Any) -> None:
        self._call: Iterator[T] = call
        self.cancel: Callable[[], bool] = call.cancel

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            return next(self._call)
        except StopIteration:
            raise StopAsyncIteration from None
