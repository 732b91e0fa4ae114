"""The connections through which ranks notice each other's end, and who may connect."""

import socket
import threading

import pytest

from loraplex_shard.device import lifeline
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


def test_the_others_notice_at_once_that_a_rank_has_left_although_a_thread_of_it_still_reads() -> None:
    own, other = socket.socketpair()
    line, lost = LifeLine([own]), threading.Event()
    line.watch(lost.set)
    other.settimeout(TIMEOUT)
    line.close()
    assert other.recv(1) == b""
    assert not lost.is_set()
    other.close()


def test_a_rank_that_serves_says_so_and_is_lost_once_it_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "BEAT_SECONDS", 0.01)
    own, other = socket.socketpair()
    line, lost = LifeLine([own]), threading.Event()
    line.watch(lost.set)
    line.beat()
    other.settimeout(TIMEOUT)
    assert other.recv(1) and other.recv(1)
    monkeypatch.setattr(lifeline, "SILENCE_SECONDS", 0.01)
    assert not lost.is_set()  # the other rank is still loading: nothing is expected of it
    other.sendall(b"\0")
    assert lost.wait(TIMEOUT)
    line.close()
    other.close()
