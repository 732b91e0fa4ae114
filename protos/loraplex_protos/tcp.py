"""Connections whose other end may be gone without a word."""

import socket
import sys


def keep_alive(connection: socket.socket, seconds: int) -> None:
    """Has the system end the connection after so long a silence of the other host, or if what was sent is not taken
    there for so long. The host's system answers for processes that wait or compute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, seconds // 4))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, seconds // 12))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * seconds)
