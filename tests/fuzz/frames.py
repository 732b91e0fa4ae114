"""Odd frames of HTTP/2, at the port of gRPC."""

from random import Random

from tests.fuzz.http import HttpRequest

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
SIZES = 0, 1, 4, 5, 8, 9, 200, 16384


def odd_frames(dice: Random) -> HttpRequest:
    """A connection that begins well, now and then with a request, and goes on with frames that are not."""
    content = PREFACE + frame(SETTINGS, 0, 0, b"")
    if dice.random() < 0.5:
        content += frame(HEADERS, 4, 1, headers())
    for _ in range(dice.randrange(1, 6)):
        kind, flags = dice.choice((*range(12), 255)), dice.choice((0, 1, 4, 5, 8, 0x20, 255))
        stream = dice.choice((0, 1, 1, 2, 3, 2**31 - 1))
        content += frame(kind, flags, stream, dice.randbytes(dice.choice(SIZES)))
    if dice.random() < 0.3:
        content += frame(DATA, 1, 1, b"\0" + dice.choice((b"\0\0\0\2\x12\0", b"\xff\xff\xff\xff", b"\0\0\0\0")))
    if dice.random() < 0.3:
        place = dice.randrange(len(content))
        content = content[:place] + dice.randbytes(3) + content[place + dice.randrange(9) :]
    return HttpRequest(content, b"", 0.0, patience=0.2)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def headers() -> bytes:
    """Those of a call to Generate, each written literally."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/loraplex.v1.GenerationService/Generate",
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())


def _text(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()
