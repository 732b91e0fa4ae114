"""JSON on one line, also for clients that count other characters as line ends than its format does."""

from typing import Any

import orjson

# What Python's str.splitlines and clients that use it (httpx's iter_lines) divide a text at, beyond \r and \n. JSON
# always escapes the ASCII ones.
LINE_ENDS = {end.encode(): b"\\u%04x" % ord(end) for end in "\x85\u2028\u2029"}


def dump_line(value: Any) -> bytes:
    """The value's JSON, without a line end, in which no character is one."""
    line = orjson.dumps(value)
    for end, escaped in LINE_ENDS.items():
        if end in line:
            line = line.replace(end, escaped)
    return line
