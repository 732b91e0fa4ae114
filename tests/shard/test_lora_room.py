"""Adapters that are being loaded wait for memory, but never forever."""

import threading
from concurrent.futures import ThreadPoolExecutor

from loraplex_shard.lora.room import Room


def test_the_total_size_is_limited() -> None:
    room, lock = Room(10), threading.Lock()
    inside: list[int] = []
    most = []

    def work(size: int) -> None:
        with room.taken(size):
            with lock:
                inside.append(size)
                most.append(sum(inside))
            with lock:
                inside.remove(size)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [3, 4, 5, 1] * 50))
    assert max(most) <= 10 and inside == []


def test_an_oversized_item_enters_alone() -> None:
    room = Room(10)
    entered = threading.Event()

    def large() -> None:
        with room.taken(1000):
            entered.set()

    with ThreadPoolExecutor(1) as pool:
        with room.taken(1):
            waiting = pool.submit(large)
            assert not entered.wait(0.05)
        waiting.result(60)
    assert entered.is_set()


def test_an_error_releases_the_room() -> None:
    room = Room(1)
    for _ in range(2):
        try:
            with room.taken(1):
                raise OSError
        except OSError:
            pass
