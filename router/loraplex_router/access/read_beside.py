"""Reads long files of the operator's in processes of their own: thousands of names take seconds, in which the router's
event loop would get the interpreter rarely."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from loraplex_protos.errors import LoraplexError

SHORT = 1 << 16  # bytes; to read less takes less than to start a process
NICENESS = 10
REFUSED = 3  # the exit status if the file is wrong; why is on stdout

Content = TypeVar("Content")

logger = logging.getLogger(__name__)


def read_beside(
    path: Path,
    read: Callable[[Path], Content],
    module: str,
    decode: Callable[[bytes], Content],
    error: type[LoraplexError],
) -> Content:
    """Returns what `read` returns, or raises `error`, as it does. Blocks, but hardly holds the interpreter's lock: a
    long file is read by a process that runs `module`, which calls write_answer; `decode` reads the answer."""
    try:
        short = path.stat().st_size <= SHORT
    except OSError:
        short = True
    if short:
        return read(path)
    command = sys.executable, "-P", "-m", module, str(path)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True, check=False
        )
    except OSError as failure:  # a limit on processes or on memory is reached
        logger.warning("%s is read in the router's own process: %s", path, failure.strerror)
        return read(path)
    if done.returncode == REFUSED:
        raise error(done.stdout.decode())
    if done.returncode:
        raise error(f"{path}: the process that reads it ended with status {done.returncode}")
    return decode(done.stdout)


def write_answer(answer: Callable[[Path], bytes]) -> None:
    """What the process does: writes the answer, or the LoraplexError that is raised."""
    os.nice(NICENESS)
    try:
        written, status = answer(Path(sys.argv[1])), 0
    except LoraplexError as error:
        written, status = error.message.encode(), REFUSED
    sys.stdout.buffer.write(written)
    sys.exit(status)
