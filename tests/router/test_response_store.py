"""Kept responses: whose they are, and which go when there is no more room or time."""

from loraplex_router.service.response_store import MOST_SECONDS, OVERHEAD, ResponseStore

CONTENT = b"x" * OVERHEAD  # an entry takes twice that


def test_each_tenant_has_its_own():
    store = ResponseStore(1 << 20)
    store.put("a", "r", b"1")
    assert store.get("b", "r") is None and not store.delete("b", "r") and store.get("a", "r") == b"1"
    store.put("a", "r", b"2")
    assert store.get("a", "r") == b"2" and store.delete("a", "r") and store.get("a", "r") is None


def test_who_has_the_most_loses_what_was_not_used_for_longest():
    store = ResponseStore(4 * 2 * OVERHEAD)
    store.put("b", "old", CONTENT)
    for id in ("1", "2", "3"):
        store.put("a", id, CONTENT)
    assert store.get("a", "1")
    store.put("a", "4", CONTENT)
    assert [id for id in ("1", "2", "3", "4") if store.get("a", id)] == ["1", "3", "4"] and store.get("b", "old")


def test_what_is_larger_than_everything_may_be_is_not_kept():
    store = ResponseStore(4 * OVERHEAD)
    store.put("a", "1", b"1")
    store.put("a", "2", bytes(4 * OVERHEAD))
    assert store.get("a", "1") and not store.get("a", "2") and not ResponseStore(0).keeps


def test_they_are_kept_for_a_time_after_their_last_use():
    now = 0.0
    store = ResponseStore(1 << 20, lambda: now)
    for id in ("1", "2"):
        store.put("a", id, b"")
    now = MOST_SECONDS
    assert store.get("a", "1") == b""
    now += 1
    assert store.get("a", "2") is None and store.get("a", "1") == b""
