"""A few hundred of the requests of `python -m tests.fuzz`."""

from pathlib import Path

from tests.fuzz.run import fuzz


async def test_odd_requests_are_answered_and_a_stream_beside_them_is_not_changed(tmp_path: Path):
    report = await fuzz(tmp_path, seed=1, requests=400, at_a_time=8)
    assert report.statuses["200"] and report.statuses["OK"] and report.seen.canaries
    assert report.faults == []
    assert "\na gap of " in str(report) and "\n  number " in str(report)
