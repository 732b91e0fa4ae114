"""The connections through which ranks notice each other's end, and who may connect."""

import socket
import threading

from loraplex_shard.device.lifeline import TOKEN_BYTES, LifeLine, accept

TOKEN = bytes(range(TOKEN_BYTES))
TIMEOUT = 30


def test_connections_without_the_token_are_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stranger, rank = (socket.create_connection(listener.getsockname(), TIMEOUT) for _ in range(2))
        with stranger, rank:
            stranger.sendall(bytes(TOKEN_BYTES))
            rank.sendall(TOKEN)
            with accept(listener, TOKEN) as accepted:
                assert stranger.recv(1) == b""
                assert accepted.getpeername() == rank.getsockname()


def test_the_end_of_the_other_side_is_noticed_unless_it_was_released() -> None:
    for let_go in (False, True):
        own, other = socket.socketpair()
        lost = threading.Event()
        line = LifeLine([own])
        line.watch(lost.set)
        if let_go:
            line.let_go()
        other.close()
        for thread in threading.enumerate():
            if thread.name == "lifeline":
                thread.join(TIMEOUT)
        assert lost.is_set() is not let_go
        line.close()
