"""A stream that must not notice: `python -m tests.fuzz.canary ADDRESS`. It runs in a process of its own, which nothing
delays that is done for the odd requests. Once its standard input has ended, it prints what it has seen, as JSON."""

import asyncio
import json
import sys
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from time import monotonic

from loraplex import AsyncClient

REQUEST = {"prompt": "A canary", "max_new_tokens": 200, "ignore_eos": True, "seed": 1, "temperature": 1.0}


@dataclass
class Seen:
    canaries: int = 0
    gaps: list[tuple[float, float]] = field(default_factory=list)  # seconds between two pieces; when (time.monotonic)
    late: float = 0.0  # seconds, the latest that the machine woke this process, which does little
    faults: list[str] = field(default_factory=list)


async def watch(address: str) -> Seen:
    """Reads one canary after the other."""
    seen = Seen()
    clock = asyncio.create_task(look_at_the_clock(seen))
    async with AsyncClient(address) as client:
        undisturbed = (await client.generate(**REQUEST)).text
        print("ready", flush=True)
        over = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
        while not over.done():
            text, times = "", list[float]()
            async for piece in client.stream(**REQUEST):
                times.append(monotonic())
                text += piece.text
            seen.gaps += [(later - earlier, later) for earlier, later in pairwise(times)]
            seen.canaries += 1
            if text != undisturbed:
                seen.faults.append(f"the canary said {text!r}, not {undisturbed!r}")
    clock.cancel()
    return seen


async def look_at_the_clock(seen: Seen) -> None:
    """The gaps of a machine without pauses would be shorter."""
    while True:
        due = monotonic() + 0.005
        await asyncio.sleep(0.005)
        seen.late = max(seen.late, monotonic() - due)


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(watch(sys.argv[1])))))
