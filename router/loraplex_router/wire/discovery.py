"""The replicas' addresses: those configured, and the current addresses of DNS names.

If only rank 0's address is given, a replica's other ranks listen on the ports after it.
"""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

DNS = "dns:///"
RESOLVE_SECONDS = 5.0

logger = logging.getLogger(__name__)

Lookup: TypeAlias = Callable[[str, int], Awaitable[list[str]]]


@dataclass(frozen=True, slots=True)
class Address:
    """The addresses of one replica's ranks."""

    ranks: tuple[str, ...]  # HOST:PORT or unix:PATH; of all ranks, or only of rank 0
    server_name: str = ""  # the name in the ranks' certificates, if it is not in `ranks`

    def __str__(self) -> str:
        return self.ranks[0]

    def other_ranks(self, size: int) -> tuple[str, ...]:
        """The addresses of ranks 1 and up in a replica of this size."""
        if len(self.ranks) > 1 or size == 1 or self.ranks[0].startswith("unix:"):
            return self.ranks[1:]
        host, _, port = self.ranks[0].rpartition(":")
        return tuple(f"{host}:{int(port) + rank}" for rank in range(1, size))


class Discovery:
    """The replicas' addresses. `targets` are lists of ranks, "A,B", or DNS names, "dns:///NAME:PORT"."""

    def __init__(self, targets: Sequence[str], lookup: Lookup | None = None) -> None:
        names = [target.removeprefix(DNS) for target in targets if target.startswith(DNS)]
        self._fixed = [Address(tuple(target.split(","))) for target in targets if not target.startswith(DNS)]
        self._found: dict[str, list[Address]] = {name: [] for name in names}
        self._lookup = lookup or _look_up

    async def watch(self) -> AsyncIterator[set[Address]]:
        """Yields all current addresses, and again when they change. Endless if there are DNS names."""
        last: set[Address] | None = None
        while True:
            for name in self._found:
                await self._resolve(name)
            now = {*self._fixed, *(address for found in self._found.values() for address in found)}
            if now != last:
                yield now
            if not self._found:
                return
            last = now
            await asyncio.sleep(RESOLVE_SECONDS)

    async def _resolve(self, name: str) -> None:
        host, _, port = name.rpartition(":")
        try:
            hosts = await self._lookup(host, int(port))
        except OSError as error:  # keep the previous addresses: a name server may fail
            if self._found[name]:
                logger.warning("cannot look up %s: %s", name, error)
            return
        self._found[name] = [Address((address,), server_name=host) for address in hosts]


async def _look_up(host: str, port: int) -> list[str]:
    """A name's addresses as HOST:PORT. If there are IPv4 and IPv6 addresses, only IPv4: they are the same replicas."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    by_family: dict[int, list[str]] = {socket.AF_INET: [], socket.AF_INET6: []}
    for family, _, _, _, (address, *_) in found:
        by_family[family].append(f"[{address}]:{port}" if family == socket.AF_INET6 else f"{address}:{port}")
    return by_family[socket.AF_INET] or by_family[socket.AF_INET6]
