"""Waiting for a condition: each change wakes the waiters, which continue once it holds."""

import asyncio

from loraplex_router.engine.changes import Changes


async def test_a_waiter_continues_once_the_condition_holds() -> None:
    changes, known = Changes(), {0}
    waiting = asyncio.create_task(changes.until(lambda: 1 in known))
    await asyncio.sleep(0)
    changes.notify()
    await asyncio.sleep(0)
    assert not waiting.done()
    known.add(1)
    changes.notify()
    await waiting


async def test_a_condition_that_no_longer_holds_is_waited_for_again() -> None:
    changes, known = Changes(), {1}
    known.clear()
    waiting = asyncio.create_task(changes.until(lambda: 1 in known))
    await asyncio.sleep(0)
    known.add(1)
    changes.notify()
    known.clear()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiting.done()
    known.add(1)
    changes.notify()
    await waiting


async def test_a_value_is_reported_when_it_changes() -> None:
    changes, values = Changes(), [1]
    waiting = asyncio.create_task(changes.unlike(lambda: values[-1], 1))
    await asyncio.sleep(0)
    values.append(2)
    changes.notify()
    assert await waiting == 2
