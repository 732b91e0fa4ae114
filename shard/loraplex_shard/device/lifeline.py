"""How the ranks of a group notice that one of them has ended, even while they wait for it in a collective or idle.

Each rank keeps a connection to rank 0 for as long as it lives. The kernel closes it however a process ends, and keeps
asking whether a host is still there. Once a rank serves, it also says every few seconds that it has not stopped: a
process may hang as a whole.
"""

import secrets
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

TOKEN_BYTES = 16
CONNECT_SECONDS = 60.0
HELLO_SECONDS = 5.0
# How often a rank that serves says so, and after how long a silence it counts as ended.
BEAT_SECONDS, SILENCE_SECONDS = 5.0, 30.0
# For a host that is gone without a word: idle seconds before it is asked, how often it is asked, and seconds between.
KEEPALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))


class LifeLine:
    """One rank's end of the connections."""

    def __init__(self, connections: Sequence[socket.socket]) -> None:
        self._connections = connections
        self._let_go = False
        self._closed = threading.Event()

    @classmethod
    def connect(cls, rank: int, size: int, rendezvous_url: str) -> Self:
        """To be called on all ranks of the default process group."""
        host = urlsplit(rendezvous_url).hostname or "127.0.0.1"
        if rank > 0:
            port, token = _broadcast(0, bytes(TOKEN_BYTES))
            connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
            connection.sendall(token)
            connections = [connection]
        else:
            with _listen(host) as listener:
                token = secrets.token_bytes(TOKEN_BYTES)
                _broadcast(listener.getsockname()[1], token)
                connections = [accept(listener, token) for _ in range(1, size)]
        for connection in connections:
            connection.settimeout(None)
            _keep_alive(connection)
        return cls(connections)

    def watch(self, lost: Callable[[], None]) -> None:
        """From now on `lost` is called, on a thread, when a rank ends. The others notice rank 0's end alone, so it must
        end when one of them does."""
        for connection in self._connections:
            threading.Thread(target=self._wait, args=(connection, lost), name="lifeline", daemon=True).start()

    def beat(self) -> None:
        """From now on this rank says that it lives, and must: the others take its silence for its end."""
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def let_go(self) -> None:
        """The others may end from now on."""
        self._let_go = True

    def close(self) -> None:
        """The others notice that this rank has ended."""
        self._let_go = True
        self._closed.set()
        for connection in self._connections:
            with suppress(OSError):  # the other end has left
                connection.shutdown(socket.SHUT_RDWR)  # a thread that reads it would keep it open
            connection.close()

    def _wait(self, connection: socket.socket, lost: Callable[[], None]) -> None:
        with suppress(OSError):  # the host is gone, or the rank is silent
            while connection.recv(64):
                connection.settimeout(SILENCE_SECONDS)
        if not self._let_go:
            lost()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            for connection in self._connections:
                with suppress(OSError):  # it is noticed where this connection is read
                    connection.send(b"\0")


def _broadcast(port: int, token: bytes) -> tuple[int, bytes]:
    """Rank 0's."""
    message = torch.tensor([*port.to_bytes(2), *token], dtype=torch.uint8)
    dist.broadcast(message, src=0)
    received = bytes(message.tolist())
    return int.from_bytes(received[:2]), received[2:]


def _listen(host: str) -> socket.socket:
    """At the address that the others know this host by or, if it is not one of this host's own, at all of them."""
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    try:
        return socket.create_server(address[:2], family=family)
    except OSError:
        return socket.create_server(("", 0), family=family)


def accept(listener: socket.socket, token: bytes) -> socket.socket:
    """The next rank. Whoever else comes is sent away."""
    listener.settimeout(CONNECT_SECONDS)
    while True:
        connection, _ = listener.accept()
        connection.settimeout(HELLO_SECONDS)
        try:
            if secrets.compare_digest(connection.recv(TOKEN_BYTES, socket.MSG_WAITALL), token):
                return connection
        except OSError:
            pass
        connection.close()


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        for name, value in KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
