"""Two servers share a bucket of batches. The one that runs them is stopped until the other one has taken over, which is
killed then: each line has one answer."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from openai import OpenAI

from loraplex_router.batches.bucket_job import MOST_ROWS
from tests.e2e.processes import Server
from tests.e2e.test_batches import texts, written
from tests.stand_in_stores import StandInS3

COUNT = 3 * MOST_ROWS  # the first part is written before half of it is answered
SECONDS = 120


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_batch_in_a_bucket_outlives_sigstop_and_kill_9(
    model: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = str(model), f"--adapters={adapters}", "--kv-blocks=512", "--threads=1", "--batches=s3://bucket/team"
    with StandInS3(monkeypatch) as store:

        def lease() -> bytes:
            return store.objects.get("bucket/team/lease", b"").partition(b" ")[0]

        def rows() -> int:
            parts = [content for name, content in dict(store.objects).items() if "/parts/" in name]
            return sum(content.count(b"\n") for content in parts)

        with Server(*flags) as first, Server(*flags) as second:
            one = OpenAI(base_url=f"{first.url}/v1", api_key="none", max_retries=0)
            until(lambda: bool(lease()))
            file = one.files.create(file=written(*range(COUNT), tokens=8), purpose="batch")
            batch = one.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
            owner = lease()
            until(lambda: rows() > 0)
            first.process.send_signal(signal.SIGSTOP)
            try:
                seen = rows()
                assert seen < COUNT
                until(lambda: lease() != owner and rows() > seen)
            finally:
                first.process.send_signal(signal.SIGCONT)
            second.kill()
            until(lambda: one.batches.retrieve(batch.id).status == "completed")
            batch = one.batches.retrieve(batch.id)
            assert batch.request_counts and batch.request_counts.completed == COUNT and batch.output_file_id
            found = texts(one.files.content(batch.output_file_id).content)
            assert found.keys() == {str(number) for number in range(COUNT)}
            for line in map(json.loads, written(0, 1, COUNT - 1, tokens=8).splitlines()):
                assert found[line["custom_id"]] == one.completions.create(**line["body"]).choices[0].text
            assert {each.id for each in one.files.list()} == {file.id, batch.output_file_id}
            first.assert_nothing_is_held()
            assert "Traceback" not in first.log
