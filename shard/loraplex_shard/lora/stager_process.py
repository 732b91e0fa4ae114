"""What runs in the stager and in the processes that it forks: see stager.py."""

import ctypes
import gc
import os
import select
import signal
import socket
import stat
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Any, NoReturn

import torch

from loraplex_protos.errors import LoraplexError
from loraplex_shard.device.priority import NICE
from loraplex_shard.lora.passing import receive, send

FIRST_TO_GO = b"1000"  # the process that the kernel ends when memory runs out
ONE_PROCESS = b"."
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # opened before any fork: a child may inherit held locks
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
# Terminals, dumb-init and systemd send them to all processes at once. The stager is needed while its rank drains.
NOT_FOR_IT = signal.SIGINT, signal.SIGTERM


@dataclass(frozen=True, slots=True)
class Question:
    """A call of one of the rank's functions."""

    function: str
    args: tuple[Any, ...]


def serve(control: socket.socket, shared: Mapping[str, object]) -> None:
    """Forks a process for each connection that arrives, until the rank has ended."""
    gc.freeze()  # garbage of the rank is left to it: gRPC's objects end processes that have not its threads, or hang
    _close_connections(but=control.fileno())
    for number in NOT_FOR_IT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOT_FOR_IT)
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
            if (process := os.fork()) == 0:
                _end_with(stager)
                control.close()
                end_after(lambda: _answer(connection, shared))
            send(connection, process, {})


def end_after(work: Callable[[], None]) -> NoReturn:
    """Ends a forked process after its work, without what the rank would do at its end."""
    try:
        work()
    except (EOFError, ConnectionError):
        pass  # the rank needs it no more, or has ended
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _answer(connection: socket.socket, shared: Mapping[str, object]) -> None:
    """Makes the calls that arrive, until the rank needs no more."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the exit status of a program that it runs would be lost
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
            send(self._connection, Question(function, args), self)
            return receive(self._connection, self)


def _end_when_closed(connection: socket.socket) -> None:
    """Ends the process as soon as the rank needs no more of it, whatever it is doing."""
    closed = select.poll()
    closed.register(connection, select.POLLHUP)
    closed.poll()
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
