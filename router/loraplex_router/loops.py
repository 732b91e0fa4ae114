"""The router's own loops, such as the one that follows the key file. They run beside the streams, and cost them nothing
when they fail."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

AGAIN_SECONDS = 5.0

logger = logging.getLogger(__name__)


async def keep_running(loop: Callable[[], Awaitable[None]]) -> None:
    """Runs it to its end, or until cancelled. If it fails, that is logged, and it is begun again after a pause."""
    while True:
        try:
            return await loop()
        except Exception:
            logger.exception("a loop of the router failed, and is begun again in %g s", AGAIN_SECONDS)
        await asyncio.sleep(AGAIN_SECONDS)
