"""Some of the troubles of `python -m tests.chaos`, on a smaller cluster."""

from pathlib import Path

from tests.chaos.run import run, strike
from tests.tools import needs_redis


@needs_redis
async def test_streams_survive_kills_cuts_and_hangs_unchanged_and_nothing_is_held_afterwards(tmp_path: Path):
    names = "a rank is killed", "a replica is cut off", "the hub hangs", "a router is killed"
    report = await run(tmp_path, layout=(1, 1), seed=1, workers=6, event=strike(*names))
    assert report.outcomes["finished"]
    assert report.faults == []
