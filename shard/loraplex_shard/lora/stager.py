"""The stager: a process beside each rank that fetches and reads adapters for it, so that steps lose neither the
interpreter's lock nor, to speak of, a core to adapters that others have asked for.

It is a fork of the rank, taken once the model is loaded and before the rank serves. It knows the model without reading
it again, and shares its weights' memory. For each adapter it forks a process of low priority that ends once the adapter
is read: all memory goes back, and what goes wrong there, running out of memory included, is the end of that one alone.
This is the rank's side; stager_process.py is theirs.
"""

import ctypes
import os
import select
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import nan
from threading import BoundedSemaphore, Thread
from types import FunctionType, MethodType
from typing import Any, Protocol, TypeVar, TypeVarTuple

from loraplex_protos.errors import AdapterSourceError, OverloadedError, UnavailableError
from loraplex_shard.lora.once import LeftError
from loraplex_shard.lora.passing import receive, send
from loraplex_shard.lora.stager_process import LIBC, NOT_FOR_IT, ONE_PROCESS, Question, end_after, serve

# How long a process may use no processor time, several times longer than any source is waited for, and how often that
# is looked at.
HANG_SECONDS, LOOK_SECONDS = 30.0, 1.0
NOTHING_SECONDS = 1e-5  # of a processor's time between two looks

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Caller(Protocol):
    """Calls functions, here or in another process."""

    def call(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """Calls a function, such as a method of a shared object. Arguments that are functions are called here."""

    def compute(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """The same for work that keeps a processor busy: only a few at a time."""

    def end(self) -> None:
        """Nobody needs the answers any more: ends what runs, if it runs in another process. Calls raise LeftError
        then. May be called from any thread."""


class Here(Caller):
    """Calls on the calling thread."""

    def call(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        return work(*args)

    compute = call

    def end(self) -> None:
        pass


class Stager:
    """Has processes that make calls. May be used from any thread."""

    def __init__(self, shared: Mapping[str, object], on_lost: Callable[[], None] = lambda: None) -> None:
        """`shared`: the objects whose methods are called, and others that arguments consist of, by any names. They are
        known as they are now. `on_lost` is called, on a thread, when the stager has ended before `close`: there are no
        more calls then."""
        self._shared = dict(shared)
        self._on_lost = on_lost
        self._closed = False
        self._control, theirs = socket.socketpair()
        # More at a time would take as many tenths.
        self._places = BoundedSemaphore(max(1, (os.cpu_count() or 1) // 2))
        with warnings.catch_warnings():
            # Python 3.12 warns of forks where there are threads. None of them holds what the stager needs.
            warnings.simplefilter("ignore", DeprecationWarning)
            former = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_IT)  # until it ignores them
            self._id = os.fork()
        if self._id == 0:
            end_after(lambda: serve(theirs, self._shared))
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
        theirs.close()
        Thread(target=self._watch, name="stager", daemon=True).start()

    @contextmanager
    def process(self) -> Iterator[Caller]:
        """A context in which there is a process for calls. They raise the LoraplexErrors that the functions raise,
        OverloadedError if the process is killed, AdapterSourceError if it hangs, UnavailableError if the stager has
        ended, and RuntimeError for all other errors."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._begin(theirs)
            yield _Process(ours, self._id, self._shared, self._places)

    def close(self) -> None:
        """Ends the stager, once its processes have ended."""
        self._closed = True
        self._control.close()

    def _watch(self) -> None:
        with suppress(ChildProcessError):  # somebody else has waited for it: it has ended, too
            os.waitpid(self._id, 0)
        if not self._closed:
            self._on_lost()

    def _begin(self, connection: socket.socket) -> None:
        try:
            socket.send_fds(self._control, [ONE_PROCESS], [connection.fileno()])
        except OSError as error:
            raise UnavailableError("the process that reads adapters has ended, and its shard restarts") from error


class _Process(Caller):
    """A process of the stager, as the rank sees it."""

    def __init__(
        self, connection: socket.socket, stager: int, shared: Mapping[str, object], places: BoundedSemaphore
    ) -> None:
        self._connection = connection
        self._shared = shared
        self._places = places
        self._ended = False
        self._begun = False
        self._id = stager  # which forks it, and tells its id then

    def call(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        given: tuple[object, ...] = args
        functions = {f"{n}": each for n, each in enumerate(given) if isinstance(each, FunctionType | MethodType)}
        shared = {**self._shared, **functions}
        try:
            if not self._begun:
                self._id, self._begun = self._receive({}), True
            send(self._connection, (work, args), shared)
            while isinstance(answer := self._receive(shared), Question):
                send(self._connection, functions[answer.function](*answer.args), shared)
        except (EOFError, ConnectionError):
            if self._ended:
                raise LeftError("whoever asked for the adapter has left") from None
            raise OverloadedError(
                "the process that was reading the adapter has been killed; memory may be short: try again later"
            ) from None
        result, error = answer
        if error is not None:
            raise error
        returned: T = result
        return returned

    def compute(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        with self._places:
            return self.call(work, *args)

    def end(self) -> None:
        self._ended = True
        with suppress(OSError):  # the process has ended
            self._connection.shutdown(socket.SHUT_RDWR)

    def _receive(self, shared: Mapping[str, object]) -> Any:
        """What the process sends next. One that uses no processor time hangs, in a file system that does not answer for
        example: it is killed, if that can be done."""
        arrives, used, idle = select.poll(), nan, 0.0
        arrives.register(self._connection, select.POLLIN)
        while not arrives.poll(LOOK_SECONDS * 1e3):
            before, used = used, _processor_seconds(self._id)
            idle = 0.0 if used - before > NOTHING_SECONDS else idle + LOOK_SECONDS
            if idle >= HANG_SECONDS:
                with suppress(ProcessLookupError):
                    os.kill(self._id, signal.SIGKILL)
                raise AdapterSourceError(f"the adapter's source has not answered for {HANG_SECONDS:g} s: try again")
        return receive(self._connection, shared)


def _processor_seconds(process: int) -> float:
    """How much time of processors it has used: nan if it has ended, all time if the system does not tell."""
    if LIBC is None:
        return time.monotonic()
    clock = ctypes.c_int()
    if LIBC.clock_getcpuclockid(process, ctypes.byref(clock)):
        return nan
    try:
        return time.clock_gettime(clock.value)
    except OSError:  # it has ended
        return nan
