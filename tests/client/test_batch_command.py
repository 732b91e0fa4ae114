"""`loraplex batch` keeps to its files, and stops where no line can be answered."""

import fcntl
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread

import pytest
from typer.testing import CliRunner, Result

from loraplex.cli.http import SILENCE_SECONDS
from loraplex.cli.main import app
from tests.full_disk import full_disk

LINE = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "one\u2028two"}}


class UnknownKey(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_error(401)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Gone(UnknownKey):
    def do_POST(self) -> None:
        self.close_connection = True


class Answering(UnknownKey):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200 if self.path == LINE["url"] else 404)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")


class Hanging(UnknownKey):
    """Answers one line never. When that has come, it refuses the other because of the key."""

    came, left = Event(), Event()

    def do_POST(self) -> None:
        if json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"] == "hang":
            self.came.set()
            self.connection.recv(1)  # until the client closes the connection
            self.left.set()
        elif self.came.wait(60):
            self.send_error(401)


class HalfCharacter(UnknownKey):
    """Answers with a text that UTF-8 cannot encode."""

    def do_POST(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps("\ud800").encode())


class Restarting(Answering):
    """Has no answer until several calls have come."""

    refusals = Queue[int]()

    def do_POST(self) -> None:
        try:
            self.send_error(self.refusals.get_nowait())
        except Empty:
            super().do_POST()


class Stopping(UnknownKey):
    """Cancels the line it was given, and is gone."""

    stopped = Event()

    def do_POST(self) -> None:
        if self.stopped.is_set():
            self.close_connection = True
        else:
            self.stopped.set()
            self.send_error(499)


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), request.param) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps(LINE, ensure_ascii=False), "utf-8-sig")
    return file


def batch(requests: Path, answers: Path, url: str = "http://127.0.0.1:1") -> Result:
    return CliRunner().invoke(app, ["batch", str(requests), str(answers), "--url", url], env={"COLUMNS": "200"})


@pytest.mark.parametrize("content", [json.dumps(LINE), '{"id": "chatcmpl-123", "choices": []}', '{"id": "batch_42"'])
def test_a_file_of_something_else_than_answers_is_left_as_it_is(requests: Path, tmp_path: Path, content: str) -> None:
    other = tmp_path / "other.json"
    other.write_text(content)
    result = batch(requests, other)
    assert result.exit_code == 2 and "has other lines than answers: name another file" in result.output
    assert other.read_text() == content


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ({"custom_id": "b\ud800"}, r"custom_id has half a character: \ud800"),
        ({"body": {"prompt": ["a", "\udfff"]}}, r"body has half a character: \udfff"),
        ({"body": {"\udc00": 1}}, r"body has half a character: \udc00"),
    ],
)
def test_a_text_that_utf8_cannot_encode_is_refused_before_anything_is_sent(
    requests: Path, tmp_path: Path, line: dict[str, object], fault: str
) -> None:
    requests.write_text("".join(json.dumps(each) + "\n" for each in (LINE, {**LINE, "custom_id": "2", **line})))
    result = batch(requests, tmp_path / "answers.jsonl")
    assert result.exit_code == 2 and f"line 2: {fault}" in result.output


@pytest.mark.parametrize("url", [HalfCharacter], indirect=True)
def test_an_answer_that_utf8_cannot_encode_is_kept_as_json_writes_it(requests: Path, tmp_path: Path, url: str) -> None:
    answers = tmp_path / "answers.jsonl"
    assert batch(requests, answers, url).exit_code == 0
    assert json.loads(answers.read_bytes())["response"]["body"] == "\ud800"
    assert "1 of 1 lines are answered already" in batch(requests, answers, url).output


@pytest.mark.parametrize("url", [Answering], indirect=True)
@pytest.mark.parametrize("length", [1, 10, 30])
def test_an_answer_that_was_not_written_completely_is_written_again(
    requests: Path, tmp_path: Path, url: str, length: int
) -> None:
    answers = tmp_path / "answers.jsonl"
    assert batch(requests, answers, url).exit_code == 0
    answers.write_bytes(answers.read_bytes()[:length])
    assert batch(requests, answers, url).exit_code == 0
    assert [json.loads(line)["custom_id"] for line in answers.read_text().splitlines()] == ["1"]


@pytest.mark.parametrize(
    ("url", "message"),
    [(UnknownKey, "the server does not know this API key"), (Gone, "no server answers")],
    indirect=["url"],
)
def test_a_line_that_nobody_could_answer_is_sent_again_by_the_next_call(
    requests: Path, tmp_path: Path, url: str, message: str
) -> None:
    answers = tmp_path / "answers.jsonl"
    result = batch(requests, answers, url)
    assert result.exit_code == 1 and message in result.output
    assert answers.read_bytes() == b""


@pytest.mark.parametrize("url", [Restarting], indirect=True)
def test_a_line_is_sent_until_the_server_answers_it(
    requests: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.cli.batch.LONGEST_WAIT", 0.01)
    for status in (429, 499, 502, 503, 504):
        Restarting.refusals.put(status)
    answers = tmp_path / "answers.jsonl"
    assert batch(requests, answers, url).exit_code == 0
    assert Restarting.refusals.empty()
    assert [json.loads(line)["response"]["status_code"] for line in answers.read_text().splitlines()] == [200]


@pytest.mark.parametrize("url", [Stopping], indirect=True)
def test_a_line_that_a_stopping_server_cancels_is_sent_again_by_the_next_call(
    requests: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.cli.batch.LONGEST_WAIT", 0.01)
    answers = tmp_path / "answers.jsonl"
    result = batch(requests, answers, url)
    assert result.exit_code == 1 and "no server answers" in result.output
    assert answers.read_bytes() == b""


@pytest.mark.parametrize("url", [Answering], indirect=True)
def test_two_commands_do_not_write_the_same_answers(requests: Path, tmp_path: Path, url: str) -> None:
    answers = tmp_path / "answers.jsonl"
    with answers.open("ab") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        result = batch(requests, answers, url)
    assert result.exit_code == 2 and "another loraplex batch is writing this file" in result.output
    assert answers.read_bytes() == b""
    assert batch(requests, answers, url).exit_code == 0


@pytest.mark.parametrize("url", [Answering], indirect=True)
def test_the_address_may_be_the_one_of_openais_clients_and_needs_no_proxy_on_this_machine(
    requests: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    result = batch(requests, tmp_path / "answers.jsonl", f"{url}/v1")
    assert result.exit_code == 0 and "with an error: 0" in result.output


@pytest.mark.parametrize("url", [Answering], indirect=True)
def test_the_system_gives_up_a_server_whose_host_is_gone(
    requests: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = list[int]()
    monkeypatch.setattr("loraplex.cli.http.keep_alive", lambda connection, seconds: kept.append(seconds))
    batch(requests, tmp_path / "answers.jsonl", url)
    assert kept == [SILENCE_SECONDS]


@pytest.mark.parametrize("url", ["", "localhost:3000"])
def test_what_is_not_a_url_is_refused(requests: Path, tmp_path: Path, url: str) -> None:
    result = CliRunner().invoke(app, ["batch", str(requests), str(tmp_path / "answers.jsonl"), "--url", url])
    assert result.exit_code == 2 and "http://HOST:PORT" in result.output


@pytest.mark.parametrize("url", [Answering], indirect=True)
def test_after_a_full_disk_the_next_call_goes_on(requests: Path, tmp_path: Path, url: str) -> None:
    requests.write_text("".join(json.dumps({**LINE, "custom_id": f"\u2028{number}"}) + "\n" for number in range(9)))
    answers = tmp_path / "answers.jsonl"
    with full_disk(300):  # room for some answers
        result = batch(requests, answers, url)
    assert result.exit_code == 1 and "answers cannot be written: File too large" in result.output
    assert answers.stat().st_size == 300
    assert batch(requests, answers, url).exit_code == 0
    rows = [json.loads(line)["custom_id"] for line in answers.read_text().splitlines()]
    assert sorted(rows) == [f"\u2028{number}" for number in range(9)]


@pytest.mark.parametrize("url", [Hanging], indirect=True)
def test_the_command_waits_for_no_answer_after_an_error_that_ends_it(requests: Path, tmp_path: Path, url: str) -> None:
    lines = [{**LINE, "custom_id": prompt, "body": {"prompt": prompt}} for prompt in ("hang", "refuse")]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = "from loraplex_command import main; main()"
    arguments = ["batch", requests, tmp_path / "answers.jsonl", "--url", url]
    ended = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "the server does not know this API key" in ended.stderr
    assert Hanging.left.wait(60)
