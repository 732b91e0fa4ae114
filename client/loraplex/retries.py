"""When a call is tried again: if the server is unavailable or has too much to do, and nothing has been generated, or
the server resumes what has been."""

import math
import random
import time
from typing import cast

import grpc

from loraplex.rpc_errors import typed_error
from loraplex_protos.errors import BEGUN, LoraplexError, OverloadedError, UnavailableError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds; each pause is twice the one before
YEAR = 365 * 86_400.0  # a timeout that is longer counts as none: gRPC cannot tell servers of more than three years
LONGEST_WISH = 60.0  # a server that asks to wait longer is not asked again


class Attempts:
    """The attempts of one call, within its timeout, in seconds."""

    def __init__(self, server: str, max_retries: int, timeout: float | None) -> None:
        """Raises ValueError for a timeout of nan."""
        if timeout is not None and math.isnan(timeout):
            raise ValueError("timeout must be a number of seconds, not nan")
        self._server = server
        self._max_retries = max_retries
        self.renew()
        self._deadline = None if timeout is None or timeout > YEAR else time.monotonic() + timeout

    def renew(self) -> None:
        """The call has made progress: its next failure is like a first one."""
        self._left = self._max_retries
        self._pause = FIRST_PAUSE

    @property
    def timeout(self) -> float | None:
        """Of the next attempt."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def pause(self, failure: grpc.RpcError, begun: bool = False) -> float:
        """Seconds until the next attempt. Raises the failure as a LoraplexError if there is none: a call that has
        begun, or that cannot wait that long, is not repeated."""
        error = typed_error(failure, self._server)
        metadata = cast(grpc.Call, failure).initial_metadata()
        begun = begun or any(key == BEGUN for key, _ in metadata or ())
        if begun or not self._left or not isinstance(error, UnavailableError | OverloadedError):
            raise error from None
        seconds = self._wish(error) * random.uniform(1, 1.25)
        if seconds > LONGEST_WISH or (self.timeout is not None and seconds >= self.timeout):
            raise error from None
        self._left -= 1
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        return seconds

    def _wish(self, error: LoraplexError) -> float:
        asked = error.retry_after if isinstance(error, OverloadedError) else 0
        return asked or self._pause
