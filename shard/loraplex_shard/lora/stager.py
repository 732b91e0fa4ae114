"""The stager: a process beside each rank that fetches and reads adapters for it, so that steps lose neither the
interpreter's lock nor, to speak of, a core to adapters that others have asked for.

It is a fork of the rank, taken once the model is loaded and before the rank serves. It knows the model without reading
it again, and shares its weights' memory. For each adapter it forks a process of low priority that ends once the adapter
is read: all memory goes back, and what goes wrong there, running out of memory included, is the end of that one alone.
"""

import ctypes
import os
import select
import signal
import socket
import stat
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import BoundedSemaphore, Lock, Thread
from types import FunctionType, MethodType
from typing import Any, NoReturn, Protocol, TypeVar, TypeVarTuple

import torch

from loraplex_protos.errors import LoraplexError, OverloadedError, UnavailableError
from loraplex_shard.device.priority import NICE
from loraplex_shard.lora.once import LeftError
from loraplex_shard.lora.passing import receive, send

FIRST_TO_GO = b"1000"  # the process that the kernel ends when memory runs out
ONE_PROCESS = b"."
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # opened before any fork: a child may inherit held locks
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG

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
            child = os.fork()
        if child == 0:
            _end_after(lambda: _serve(theirs, self._shared))
        theirs.close()
        Thread(target=self._watch, args=(child,), name="stager", daemon=True).start()

    @contextmanager
    def process(self) -> Iterator[Caller]:
        """A context in which there is a process for calls. They raise the LoraplexErrors that the functions raise,
        OverloadedError if the process is killed, UnavailableError if the stager has ended, and RuntimeError for all
        other errors."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._begin(theirs)
            yield _Process(ours, self._shared, self._places)

    def close(self) -> None:
        """Ends the stager, once its processes have ended."""
        self._closed = True
        self._control.close()

    def _watch(self, process: int) -> None:
        with suppress(ChildProcessError):  # somebody else has waited for it: it has ended, too
            os.waitpid(process, 0)
        if not self._closed:
            self._on_lost()

    def _begin(self, connection: socket.socket) -> None:
        try:
            socket.send_fds(self._control, [ONE_PROCESS], [connection.fileno()])
        except OSError as error:
            raise UnavailableError("the process that reads adapters has ended, and its shard restarts") from error


class _Process(Caller):
    """A process of the stager, as the rank sees it."""

    def __init__(self, connection: socket.socket, shared: Mapping[str, object], places: BoundedSemaphore) -> None:
        self._connection = connection
        self._shared = shared
        self._places = places
        self._ended = False

    def call(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        given: tuple[object, ...] = args
        functions = {f"{n}": each for n, each in enumerate(given) if isinstance(each, FunctionType | MethodType)}
        shared = {**self._shared, **functions}
        try:
            send(self._connection, (work, args), shared)
            while isinstance(answer := receive(self._connection, shared), _Question):
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


@dataclass(frozen=True, slots=True)
class _Question:
    """A call of one of the rank's functions."""

    function: str
    args: tuple[Any, ...]


class _Known(dict[str, object]):
    """What the rank and a process both have, by name, as the process sees it: other names are of the rank's functions,
    which are called over the connection."""

    def __init__(self, shared: Mapping[str, object], connection: socket.socket) -> None:
        super().__init__(shared)
        self._connection = connection
        self._lock = Lock()

    def __missing__(self, name: str) -> Callable[..., Any]:
        return partial(self._ask, name)

    def _ask(self, function: str, *args: Any) -> Any:
        with self._lock:
            send(self._connection, _Question(function, args), self)
            return receive(self._connection, self)


def _serve(control: socket.socket, shared: Mapping[str, object]) -> None:
    """Forks a process for each connection that arrives, until the rank has ended."""
    _close_connections(but=control.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent to a terminal's whole group; the rank decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for its processes
    os.nice(NICE)  # forks take time, too
    torch.set_num_threads(1)  # those of the rank's pools do not exist here
    os.environ["TOKIO_WORKER_THREADS"] = "1"  # obstore would start one for each core, in each process
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, len(ONE_PROCESS), 1)
        if not message:
            return
        stager = os.getpid()
        with socket.socket(fileno=descriptors[0]) as connection, suppress(OSError):  # no process: the rank is told
            if os.fork() == 0:
                _end_with(stager)
                control.close()
                _end_after(lambda: _answer(connection, shared))


def _answer(connection: socket.socket, shared: Mapping[str, object]) -> None:
    """Makes the calls that arrive, until the rank needs no more."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_bytes(FIRST_TO_GO)
    Thread(target=_end_when_closed, args=(connection,), daemon=True).start()
    known = _Known(shared, connection)
    while True:
        work, args = receive(connection, known)
        answer: tuple[object, Exception | None]
        try:
            answer = work(*args), None
        except LoraplexError as error:
            answer = None, error
        except Exception:
            answer = None, RuntimeError(traceback.format_exc())
        send(connection, answer, known)
        del work, args, answer  # may hold an adapter


def _end_when_closed(connection: socket.socket) -> None:
    """Ends the process as soon as the rank needs no more of it, whatever it is doing."""
    closed = select.poll()
    closed.register(connection, select.POLLHUP)
    closed.poll()
    os._exit(0)


def _end_after(work: Callable[[], None]) -> NoReturn:
    """Ends a forked process after its work, without what the rank would do at its end."""
    try:
        work()
    except (EOFError, ConnectionError):
        pass  # the rank needs it no more, or has ended
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _end_with(parent: int) -> None:
    """The kernel ends this process when its parent has ended, which ends with the rank (Linux only): of a GPU's memory,
    what the rank had would not be free before all its forks have ended."""
    if LIBC is not None:
        LIBC.prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before that
            os._exit(0)


def _close_connections(but: int) -> None:
    """Closes the rank's sockets, whose other ends would not notice otherwise that it has ended, and its GPU, which
    nothing here uses. Their numbers stay taken, since objects of the rank that are collected here close them."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            file = f"/proc/self/fd/{name}"
            is_gpu = os.readlink(file).startswith("/dev/nvidia")
            if int(name) != but and (is_gpu or stat.S_ISSOCK(os.stat(file).st_mode)):
                os.dup2(nothing, int(name))
