"""File descriptors, of which each connection takes one: clients must not be able to take all, before anybody has asked
them for a key. Streams go on then, and replicas, files and other clients have some."""

import asyncio
import logging
import resource

LOG_SECONDS = 60.0

logger = logging.getLogger(__name__)


def most_grpc_connections() -> int:
    """Half of what this process may have open."""
    return min(_limit() // 2, 2**31 - 1)


class IdleConnections:
    """HTTP connections without a request. While there are many connections, the oldest of these is closed for each new
    one."""

    def __init__(self) -> None:
        self._oldest_first: dict[asyncio.Transport, None] = {}
        self._log_next = 0.0

    def add(self, transport: asyncio.Transport) -> None:
        self._oldest_first[transport] = None

    def remove(self, transport: asyncio.Transport) -> None:
        self._oldest_first.pop(transport, None)

    def make_room(self, connections: int) -> None:
        """`connections`: over HTTP, with a request or without. More than three eighths of the limit are many: half is
        for gRPC, the rest for replicas, files and processes. As many may have a request as there are descriptors."""
        most = _limit() * 3 // 8
        if connections <= most or not self._oldest_first:
            return
        oldest = next(iter(self._oldest_first))
        self.remove(oldest)
        oldest.abort()  # at once: to close it, with TLS, would wait for its client
        now = asyncio.get_running_loop().time()
        if now >= self._log_next:
            self._log_next = now + LOG_SECONDS
            logger.warning("more than %d connections over HTTP: those without a request are closed, oldest first", most)


def _limit() -> int:
    """How many files this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] % 2**63  # "no limit" may be -1
