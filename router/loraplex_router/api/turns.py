"""Reading long requests and writing long answers without holding up other streams."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

LONG = 2000  # logprobs, other numbers, or parts: writing or reading more takes longer than a step of the model

T = TypeVar("T")


async def in_turn(size: int, convert: Callable[[], T]) -> T:
    """What `convert` returns. It is called on a thread if there are many numbers or parts; `size` is how many."""
    return await asyncio.to_thread(convert) if size > LONG else convert()
