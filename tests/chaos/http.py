"""Posts over HTTP and reads server-sent events, with errors as the SDK has them."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from loraplex_protos.errors import ERROR_TYPES, LoraplexError, UnavailableError

LOST = UnavailableError("the connection was lost")


async def post(port: int, path: str, body: object) -> AsyncIterator[dict[str, Any]]:
    """The answer, or the data of its events. Raises UnavailableError if the connection breaks, and the server's typed
    error, whenever it comes. An answer in HTTP/1.0 ends with the connection, and has chunks in between."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    except OSError as error:
        raise UnavailableError(str(error)) from error
    try:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        headers = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b"text/event-stream" not in headers:
            yield _checked(json.loads(await reader.read()))
            return
        ended = False
        while line := await reader.readline():
            if line.startswith(b"data: "):
                assert not ended, "an event after the end"
                ended = line.strip() == b"data: [DONE]"
                if not ended:
                    yield _checked(json.loads(line.removeprefix(b"data: ")))
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
