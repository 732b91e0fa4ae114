"""What makes a rank end because its group cannot go on."""

import logging
import os
import threading
from contextlib import suppress
from queue import Empty, SimpleQueue

from loraplex_protos.errors import LoraplexError

# In which a rank of a group that cannot go on ends in good order; it may hang in a collective.
END_SECONDS = 3.0

logger = logging.getLogger(__name__)


class GroupLostError(LoraplexError):
    """The ranks cannot go on together: one has ended, a step has failed or hangs on one and maybe not on the others."""


class Troubles:
    """Why the ranks cannot go on together, from whichever thread notices it."""

    def __init__(self) -> None:
        self._reasons = SimpleQueue[str]()

    def report(self, reason: str) -> None:
        """Ends the process: in good order, if it does not hang in a collective."""
        self._reasons.put(reason)
        end_soon(1, reason)

    def wait(self, seconds: float) -> str | None:
        """The first reason, if there is one within `seconds`."""
        with suppress(Empty):
            return self._reasons.get(timeout=seconds)
        return None


def end_soon(status: int, reason: str) -> None:
    """The process ends with this status, whatever hangs, unless it ends by itself before."""
    end = threading.Timer(END_SECONDS, _end, (status, reason))
    end.daemon = True
    end.start()


def _end(status: int, reason: str) -> None:
    logger.critical("%s, and this one hangs", reason)
    logging.shutdown()
    os._exit(status)
