"""The stager: a process beside each rank that reads adapters for it, so that steps lose neither the interpreter's lock
nor, to speak of, a core to adapters that others have asked for.

It is a fork of the rank, taken once the model is loaded and before the rank serves. It knows the model without reading
it again, and shares its weights' memory. For each call it forks a process of low priority that ends with the call: all
memory goes back, and what goes wrong there, running out of memory included, is the end of that call alone.
"""

import ctypes
import os
import signal
import socket
import stat
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import BoundedSemaphore, Thread
from typing import NoReturn, TypeVar, TypeVarTuple

import torch

from loraplex_protos.errors import LoraplexError, OverloadedError, UnavailableError
from loraplex_shard.lora.passing import receive, send

NICE = 10  # where cores are busy, a call gets about a tenth of what a step's thread gets
FIRST_TO_GO = b"1000"  # the process that the kernel ends when memory runs out
ONE_CALL = b"."
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # opened before any fork: a child may inherit held locks
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Stager:
    """Makes calls in processes of their own. May be used from any thread."""

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

    def run(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """Calls a method of a shared object. Raises the LoraplexErrors that it raises, OverloadedError if its process
        is killed, UnavailableError if the stager has ended, and RuntimeError for all other errors."""
        with self._places:
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    self._begin(theirs)
                try:
                    send(ours, (work, args), self._shared)
                    result, error = receive(ours, self._shared)
                except (EOFError, ConnectionError):
                    raise OverloadedError(
                        "the process that was reading the adapter has been killed; memory may be short: try again later"
                    ) from None
        if error is not None:
            raise error
        returned: T = result
        return returned

    def close(self) -> None:
        """Ends the stager, once its calls have ended."""
        self._closed = True
        self._control.close()

    def _watch(self, process: int) -> None:
        with suppress(ChildProcessError):  # somebody else has waited for it: it has ended, too
            os.waitpid(process, 0)
        if not self._closed:
            self._on_lost()

    def _begin(self, connection: socket.socket) -> None:
        try:
            socket.send_fds(self._control, [ONE_CALL], [connection.fileno()])
        except OSError as error:
            raise UnavailableError("the process that reads adapters has ended, and its shard restarts") from error


def _serve(control: socket.socket, shared: Mapping[str, object]) -> None:
    """Forks a process for each connection that arrives, until the rank has ended."""
    _close_connections(but=control.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent to a terminal's whole group; the rank decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes of calls
    os.nice(NICE)  # forks take time, too
    torch.set_num_threads(1)  # those of the rank's pools do not exist here
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, len(ONE_CALL), 1)
        if not message:
            return
        stager = os.getpid()
        with socket.socket(fileno=descriptors[0]) as connection, suppress(OSError):  # no process: the rank is told
            if os.fork() == 0:
                _end_with(stager)
                control.close()
                _end_after(lambda: _answer(connection, shared))


def _answer(connection: socket.socket, shared: Mapping[str, object]) -> None:
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_bytes(FIRST_TO_GO)
    work, args = receive(connection, shared)
    answer: tuple[object, Exception | None]
    try:
        answer = work(*args), None
    except LoraplexError as error:
        answer = None, error
    except Exception:
        answer = None, RuntimeError(traceback.format_exc())
    send(connection, answer, shared)


def _end_after(work: Callable[[], None]) -> NoReturn:
    """Ends a forked process after its work, without what the rank would do at its end."""
    try:
        work()
    except (EOFError, ConnectionError):
        pass  # the rank has ended
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
