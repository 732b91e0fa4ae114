"""Runs a section's checks in a process of its own, so that one that crashes, hangs or spoils the CUDA context does not
end the others: the process is replaced, and the next one continues after the check that failed."""

import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from bench.gpu.check import DeviceName, Result, Row, Section
from bench.gpu.spoilt import is_spoilt

START, REST = "(start)", "(the rest)"  # in the place of a check's name


def run_section(section: Section, device: DeviceName, context: BaseContext, deadline: float) -> Iterator[Result]:
    """Yields each check's result as soon as it is there, until `deadline`, a time of time.monotonic."""
    done, ended = 0, False
    while not ended:
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(section, device, done, theirs))  # type: ignore[attr-defined]
        process.start()
        theirs.close()
        try:
            ended = True  # unless a check ends the process
            for result in _results(section, ours, process, deadline):
                done += 1
                ended = result.check in (START, REST)
                yield result
            ended = ended or process.exitcode == 0
        finally:
            _end(process)


def _results(section: Section, pipe: Connection, process: BaseProcess, deadline: float) -> Iterator[Result]:
    """The results of one process, until it has ended or must be ended."""
    name, began = START, time.monotonic()
    try:
        while (announced := _receive(pipe, deadline)) is not None:
            name, seconds = announced
            began = time.monotonic()
            rows, reason = _receive(pipe, min(began + seconds, deadline))
            yield Result(section.name, name, "FAIL" if reason else "PASS", time.monotonic() - began, rows, reason)
            name = ""
    except TimeoutError:
        spent = time.monotonic() - began
        if time.monotonic() < deadline:
            yield Result(section.name, name, "FAIL", spent, reason=f"did not end within {spent:.0f} s")
        else:
            yield Result(section.name, REST, "LATE", spent, reason=f"from {name or 'the next check'} on")
        return
    except EOFError:
        process.join()
        if name:  # else it ended itself, after a check had spoilt it
            why = f"its process ended: {_why(process.exitcode)}"
            yield Result(section.name, name, "FAIL", time.monotonic() - began, reason=why)
        return
    process.join()


def _receive(pipe: Connection, deadline: float) -> Any:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        raise TimeoutError
    return pipe.recv()


def _child(section: Section, device: DeviceName, first: int, pipe: Connection) -> None:
    os.setsid()  # what it starts is ended with it
    for number, check in enumerate(section.checks(device)):
        if number < first:
            continue
        pipe.send((check.name, check.seconds))
        rows: list[Row] = []
        try:
            found = check.run()
            rows, reason = ([found] if isinstance(found, dict) else found or []), ""
        except Exception as error:
            reason = _reason(error)
        pipe.send((rows, reason))
        if reason and is_spoilt():
            os._exit(1)
    pipe.send(None)
    os._exit(0)  # nothing that a check left behind may delay the end


def _reason(error: Exception) -> str:
    """The error, and the line of ours that it comes from."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    where = f" ({os.path.relpath(ours[-1].filename)}:{ours[-1].lineno})" if ours else ""
    return f"{type(error).__name__}: {error}{where}"


def _why(status: int | None) -> str:
    return f"signal {signal.Signals(-status).name}" if status is not None and status < 0 else f"exit status {status}"


def _end(process: BaseProcess) -> None:
    """Ends the process, and all that it started, whether it has ended by itself or not."""
    with suppress(ProcessLookupError, TypeError):
        os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.kill()
    process.join()
