"""Posts over HTTP and reads server-sent events, with errors as the SDK has them."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from loraplex_protos.errors import ERROR_TYPES, LoraplexError, UnavailableError

LOST = UnavailableError("the connection was lost")
AGAIN_SECONDS = 0.5  # before a stream is resumed
RESUMES = 100


async def post(port: int, path: str, body: object) -> AsyncIterator[dict[str, Any]]:
    """The answer, or the data of its events; these are resumed if the connection breaks. Raises UnavailableError if
    that is not possible, and the server's typed error, whenever it comes."""
    last = ""
    for _ in range(RESUMES):
        try:
            async for id, data in _send(port, path, body, last):
                last = id
                yield data
            return
        except UnavailableError:
            if not last:
                raise
        await asyncio.sleep(AGAIN_SECONDS)
    raise LOST


async def _send(port: int, path: str, body: object, last: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """The events' ids and data; an answer that is not a stream has no id. An answer in HTTP/1.0 ends with the
    connection, and has chunks in between."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    except OSError as error:
        raise UnavailableError(str(error)) from error
    try:
        content = json.dumps(body).encode()
        headers = ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        headers += [f"Last-Event-ID: {last}"] if last else []
        head = "\r\n".join([f"POST {path} HTTP/1.0", *headers])
        writer.write(head.encode() + b"\r\n\r\n" + content)
        answered = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b"text/event-stream" not in answered:
            yield "", _checked(json.loads(await reader.read()))
            return
        id, ended = "", False
        while line := await reader.readline():
            name, _, value = line.decode().strip().partition(": ")
            if name == "id":
                id = value
            elif name == "data":
                assert not ended, "an event after the end"
                ended = value == "[DONE]"
                if not ended:
                    yield id, _checked(json.loads(value))
        if not ended:
            raise LOST
    except (OSError, EOFError, json.JSONDecodeError) as error:
        raise LOST from error
    finally:
        writer.close()


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        told = answer["error"]
        raise ERROR_TYPES.get(told["code"], LoraplexError)(told["message"])
    return answer
