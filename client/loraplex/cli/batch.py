"""`loraplex batch`: answers a file of requests over HTTP, and continues where it stopped."""

import fcntl
import json
import os
import secrets
import threading
from contextlib import suppress
from http.client import BadStatusLine, HTTPException
from pathlib import Path
from queue import Empty, Queue, SimpleQueue
from typing import IO, Annotated, Any
from urllib.error import HTTPError
from urllib.request import Request

import typer

from loraplex.cli.connection import ApiKey
from loraplex.cli.http import open_url, read_url

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
BATCH_ID = "batch_req_"
BEGINNING = f'{{"id": "{BATCH_ID}'.encode()  # of an answer
LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}  # to str.splitlines, though not in JSON
UNANSWERED = (429, 499, 502, 503, 504)  # the server is busy or stops (499), or a gateway does not reach it
LONGEST_WAIT = 30.0  # seconds before a line that was not answered is sent again
SECONDS = 3600.0  # without a byte of an answer, until the server counts as unreachable

Line = dict[str, Any]


def batch(
    requests: Annotated[
        Path, typer.Argument(metavar="REQUESTS", help="JSON lines as OpenAI's Batch API takes them.", dir_okay=False)
    ],
    answers: Annotated[
        Path, typer.Argument(metavar="ANSWERS", help="Where the answers go. Lines that it has are not sent again.")
    ],
    url: Annotated[
        str, typer.Option("--url", envvar="LORAPLEX_URL", help="The server's HTTP address.")
    ] = "http://localhost:3000",
    api_key: ApiKey = None,
    parallel: Annotated[int, typer.Option("--parallel", min=1, max=1024, help="Lines that are sent at a time.")] = 32,
) -> None:
    """Answer a file of requests in the background. Everybody else's requests come first.

    A line is {"custom_id": ..., "method": "POST", "url": "/v1/...", "body": {...}}. Called again after an interruption,
    it continues.
    """
    url, lines = read_url(url), read_requests(requests)
    with _open(answers) as output:
        done = _answered(output)
        rest = [line for line in lines if line["custom_id"] not in done]
        if done:
            typer.echo(f"{len(lines) - len(rest)} of {len(lines)} lines are answered already", err=True)
        failed = _run(rest, output, url, api_key, parallel)
    typer.echo(f"lines answered: {len(rest)}, with an error: {failed}", err=True)


def read_requests(path: Path) -> list[Line]:
    """Ends the command with a message that names the first wrong line."""
    found, seen = list[Line](), set[str]()
    try:
        texts = path.read_text("utf-8-sig").split("\n")  # splitlines() would also split within JSON's texts, at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot be read: {error}", param_hint="REQUESTS") from error
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        if fault := _fault(line := _parse(text), seen):
            raise typer.BadParameter(f"line {number}: {fault}", param_hint="REQUESTS")
        seen.add(line["custom_id"])
        found.append(line)
    if not found:
        raise typer.BadParameter("has no lines", param_hint="REQUESTS")
    return found


def _is_answer(line: Any) -> bool:
    return isinstance(line, dict) and isinstance(line.get("custom_id"), str) and "response" in line


def _parse(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _fault(line: Any, seen: set[str]) -> str | None:
    if not isinstance(line, dict):
        return "is not a JSON object"
    if not isinstance(line.get("custom_id"), str):
        return "custom_id must be a text"
    if line["custom_id"] in seen:
        return "another line has this custom_id"
    if line.get("method", "POST") != "POST" or line.get("url") not in ENDPOINTS:
        return f'the method must be "POST", and the url one of {", ".join(ENDPOINTS)}'
    if not isinstance(line.get("body"), dict) or line["body"].get("stream"):
        return "body must be an object, without stream"
    for field in ("custom_id", "body"):
        if half := _half_character(line[field]):
            return f"{field} has half a character: {half}"
    return None


def _half_character(value: Any) -> str | None:
    """The first lone surrogate in its texts, as JSON writes it. UTF-8 has none."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x}"
    return None


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("a+b")
    except OSError as error:
        raise typer.BadParameter(f"cannot be written: {error.strerror}", param_hint="ANSWERS") from error


def _answered(output: IO[bytes]) -> set[str]:
    """The custom_ids of the answers, whose last line is cut off if it was not written completely. Ends the command with
    a message if the file has something else, or if another command writes it. None will until it is closed."""
    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise typer.BadParameter("another loraplex batch is writing this file", param_hint="ANSWERS") from error
    except OSError as error:
        raise typer.BadParameter(f"cannot be locked: {error.strerror}", param_hint="ANSWERS") from error
    output.seek(0)
    whole, newline, torn = output.read().rpartition(b"\n")
    rows = whole.splitlines()
    if not all(_is_answer(_parse(row)) for row in rows) or not BEGINNING.startswith(torn[: len(BEGINNING)]):
        raise typer.BadParameter("has other lines than answers: name another file", param_hint="ANSWERS")
    output.truncate(len(whole + newline))
    return {json.loads(row)["custom_id"] for row in rows}


def _run(lines: list[Line], output: IO[bytes], url: str, api_key: str | None, parallel: int) -> int:
    """Sends the lines; how many of them failed. When it ends early, nothing more is sent, and what is being answered is
    not waited for: the threads end with the command, and the server notices that."""
    waiting, answers, stop = SimpleQueue[Line](), Queue[Line | Exception](parallel), threading.Event()
    for line in lines:
        waiting.put(line)
    for _ in range(min(parallel, len(lines))):
        threading.Thread(target=_work, args=(waiting, answers, url, api_key, stop), daemon=True).start()
    try:
        return sum(_write(answers.get(), output) for _ in lines)
    finally:
        stop.set()


def _work(
    waiting: SimpleQueue[Line],
    answers: Queue[Line | Exception],
    url: str,
    api_key: str | None,
    stop: threading.Event,
) -> None:
    with suppress(Empty):
        while not stop.is_set():
            line = waiting.get_nowait()
            try:
                answers.put(_ask(line, url, api_key, stop))
            except Exception as error:
                answers.put(error)


def _write(row: Line | Exception, output: IO[bytes]) -> bool:
    """Whether the line failed. Ends the command with a message if nobody answers, or if the answer cannot be kept."""
    if isinstance(row, OSError | HTTPException):
        not_http = isinstance(row, BadStatusLine) and not isinstance(row, OSError)
        reason = "it does not speak HTTP" if not_http else getattr(row, "reason", row)
        typer.echo(f"error: no server answers: {reason}. Give its address with --url.", err=True)
        raise typer.Exit(1)
    if isinstance(row, Exception):
        raise row
    if row["response"]["status_code"] == 401:  # not an answer to the line: it is to be sent again with another key
        typer.echo("error: the server does not know this API key: give another one with --api-key", err=True)
        raise typer.Exit(1)
    try:
        text = json.dumps(row, ensure_ascii=False).translate(LINE_ENDS)
        data = text.encode(errors="backslashreplace") + b"\n"  # half characters as JSON writes them
        while data:
            data = data[os.write(output.fileno(), data) :]
        os.fsync(output.fileno())
    except OSError as error:
        typer.echo(f"error: answers cannot be written: {error.strerror}. The next call goes on from here.", err=True)
        raise typer.Exit(1) from None
    return bool(row["response"]["status_code"] >= 400)


def _ask(line: Line, url: str, api_key: str | None, stop: threading.Event) -> Line:
    """The answer to a line, which is sent again while the server has none, until `stop`. Raises OSError or
    HTTPException if nobody answers."""
    headers = {"Content-Type": "application/json", "Priority": "u=7"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    request, pause = Request(url + line["url"], json.dumps(line["body"]).encode(), headers), 1.0
    while True:
        try:
            with open_url(request, SECONDS) as answer:
                return _row(line, answer.status, answer.headers, answer.read())
        except HTTPError as error:
            after = error.headers.get("Retry-After", "")
            seconds = min(float(after) if after.isdecimal() else pause, LONGEST_WAIT)
            if error.code not in UNANSWERED or stop.wait(seconds):
                return _row(line, error.code, error.headers, error.read())
            pause = min(2 * pause, LONGEST_WAIT)


def _row(line: Line, status: int, headers: Any, body: bytes) -> Line:
    try:
        answer = json.loads(body)
    except ValueError:
        answer = {"error": {"message": body.decode(errors="replace")[:1000]}}
    response = {"status_code": status, "request_id": headers.get("X-Request-Id", ""), "body": answer}
    id = f"{BATCH_ID}{secrets.token_hex(12)}"
    return {"id": id, "custom_id": line["custom_id"], "response": response, "error": None}
