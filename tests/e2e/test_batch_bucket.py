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
from tests.stand_in_writes import Objects

COUNT = 3 * MOST_ROWS  # so that there is more than one part
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
    strikes = list[Callable[[], None]]()  # the next one comes when answers have been written, before the store says so

    def put(name: str, content: bytes) -> None:
        Objects.put(store.objects, name, content)
        if "/parts/" in name and strikes:
            strikes.pop(0)()

    with StandInS3(monkeypatch) as store:
        monkeypatch.setattr(store.objects, "put", put)
        with Server(*flags) as first, Server(*flags) as second:
            strikes += [lambda: first.process.send_signal(signal.SIGSTOP), second.process.kill]
            one = OpenAI(base_url=f"{first.url}/v1", api_key="none", max_retries=0)
            try:
                file = one.files.create(file=written(*range(COUNT), tokens=8), purpose="batch")
                batch = one.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
                until(lambda: not strikes)
            finally:
                first.process.send_signal(signal.SIGCONT)
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
