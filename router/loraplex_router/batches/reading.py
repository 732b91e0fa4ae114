"""Reads the lines of a batch's input."""

import time
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from loraplex_router.batches.records import LineError
from loraplex_router.text.json_limits import check_structure

MOST_LINES = 50_000  # OpenAI's limit
MOST_ERRORS = 100  # that are reported
PIECE, EACH = 2**16, 2**10  # bytes of lines that take about a millisecond to read, and what each takes besides
PAUSE_SECONDS = 0.003  # after a piece


@dataclass(frozen=True, slots=True)
class Line:
    custom_id: str
    url: str
    body: dict[str, Any]


def read_line(text: bytes, endpoint: str) -> Line | LineError:
    try:
        check_structure(text)  # as the route does, which gets the line as it is written anew
    except ValueError as error:
        return LineError(code="invalid_json_line", message=f"This line {error}.")
    try:
        sent = orjson.loads(text.removeprefix(BOM_UTF8))  # which some editors write at the beginning
    except ValueError:
        return LineError(code="invalid_json_line", message="This line is not valid JSON.")
    if not isinstance(sent, dict):
        return LineError(code="invalid_json_line", message="This line is not a JSON object.")
    custom_id, body = sent.get("custom_id"), sent.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        return _wrong("custom_id", "must be a string that is not empty")
    if sent.get("method") != "POST":
        return _wrong("method", 'must be "POST"')
    if sent.get("url") != endpoint:
        return LineError(code="mismatched_url", message=f"The url must be {endpoint}, as the batch's.", param="url")
    if not isinstance(body, dict):
        return _wrong("body", "must be an object")
    if body.get("stream"):
        return _wrong("body.stream", "must be false")
    return Line(custom_id, endpoint, body)


def check_lines(texts: Iterable[bytes], endpoint: str, longest: int) -> tuple[int, list[LineError]]:
    """How many lines there are, without empty ones, and what is wrong. `longest`: bytes of a line."""
    errors, seen, count = list[LineError](), set[str](), 0
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        count += 1
        if count > MOST_LINES:
            return count, [LineError(code="too_many_tasks", message=f"A batch has at most {MOST_LINES} lines.")]
        line = read_line(text, endpoint) if len(text) <= longest else _wrong("body", f"has more than {longest} bytes")
        if isinstance(line, Line) and line.custom_id in seen:
            line = LineError(code="duplicate_custom_id", message="Another line has this custom_id.", param="custom_id")
        if isinstance(line, Line):
            seen.add(line.custom_id)
        elif len(errors) < MOST_ERRORS:
            errors.append(line.model_copy(update={"line": number}))
    if not count:
        errors.append(LineError(code="empty_file", message="The input file has no lines."))
    return count, errors


def unhurried(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines, with pauses for a thread that reads many: while it works, the event loop rarely gets the
    interpreter."""
    read = 0
    for line in lines:
        yield line
        read += len(line) + EACH
        if read >= PIECE:
            time.sleep(PAUSE_SECONDS)
            read = 0


def split_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of what comes in pieces, with their ends."""
    begun = list[bytes]()
    for piece in pieces:
        *lines, rest = piece.split(b"\n")
        for line in lines:
            yield b"".join((*begun, line, b"\n"))
            begun = []
        begun.append(rest)
    if last := b"".join(begun):
        yield last


def _wrong(field: str, description: str) -> LineError:
    return LineError(code="invalid_request", message=f"{field} {description}.", param=field)
