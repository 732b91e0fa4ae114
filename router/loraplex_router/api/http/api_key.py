"""The API key that an HTTP request presents."""

from fastapi import Request

from loraplex_router.access.keys import read_bearer


def api_key(http: Request) -> str | None:
    """The bearer token of its Authorization header, if there is one. Where the server has no keys, LoRAX's clients send
    a token for the hub in its place."""
    return read_bearer(http.headers.get("authorization"))
