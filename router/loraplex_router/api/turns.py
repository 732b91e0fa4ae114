"""Writing long answers without holding up other streams."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

LONG = 2000  # logprobs, or other numbers: writing more than these takes longer than a step of the model

T = TypeVar("T")


async def in_turn(size: int, write: Callable[[], T]) -> T:
    """What `write` returns. It is called on a thread if the answer has many numbers; `size` is how many."""
    return await asyncio.to_thread(write) if size > LONG else write()
