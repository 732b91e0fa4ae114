"""Batches survive kill -9 of the server; the command continues where it stopped."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from openai import OpenAI

from tests.e2e.processes import Server

COUNT = 80


def written(*numbers: int, tokens: int = 24) -> bytes:
    def line(number: int) -> dict[str, Any]:
        body = {"model": "r4" if number % 2 else "", "prompt": f"line {number}", "max_tokens": tokens, "temperature": 0}
        return {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}

    return b"".join(json.dumps(line(number)).encode() + b"\n" for number in numbers)


def texts(content: bytes) -> dict[str, str]:
    rows = [json.loads(line) for line in content.splitlines()]
    found = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows}
    assert len(found) == len(rows)
    return found


def test_a_batch_outlives_kill_9_and_the_command_gives_the_same_answers(
    model: Path, adapters: Path, tmp_path: Path
) -> None:
    flags = [
        str(model),
        f"--adapters={adapters}",
        "--kv-blocks=512",
        "--threads=1",
        f"--batches={tmp_path / 'batches'}",
    ]
    content = written(*range(COUNT))
    with Server(*flags) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        file = client.files.create(file=content, purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        answers = list((tmp_path / "batches").glob("*/files/*/content"))
        while sum(each.read_bytes().count(b"\n") for each in answers) < COUNT + 5:
            answers = list((tmp_path / "batches").glob("*/files/*/content"))
            time.sleep(0.01)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    with Server(*flags) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        while (batch := client.batches.retrieve(batch.id)).status != "completed":
            time.sleep(0.1)
        assert batch.request_counts and batch.request_counts.completed == COUNT and batch.output_file_id
        found = texts(client.files.content(batch.output_file_id).content)

        (tmp_path / "in.jsonl").write_bytes(content)
        (tmp_path / "out.jsonl").write_bytes(b'{"id": "batch_req_0", "custom')  # the command was killed as it wrote
        command = [sys.executable, "-m", "loraplex.cli.main", "batch", "in.jsonl", "out.jsonl", f"--url={server.url}"]
        subprocess.run(command, cwd=tmp_path, check=True)
        assert texts((tmp_path / "out.jsonl").read_bytes()) == found
        again = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        assert f"{COUNT} of {COUNT} lines are answered already" in again.stderr
        server.assert_nothing_is_held()
