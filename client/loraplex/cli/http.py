"""Calls over HTTP."""

from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit
from urllib.request import AbstractHTTPHandler, HTTPHandler, HTTPSHandler, ProxyHandler, Request, build_opener

import typer

from loraplex_protos.tcp import keep_alive

SILENCE_SECONDS = 60  # of the server's host, which may be gone without a word
LOCAL = "localhost", "127.0.0.1", "::1"


class KeptAlive(AbstractHTTPHandler):
    """Opens connections that end when the server's host is gone."""

    def do_open(self, http_class: Any, req: Request, **options: Any) -> HTTPResponse:
        class Connection(http_class):  # type: ignore[misc]
            def connect(self) -> None:
                super().connect()
                keep_alive(self.sock, SILENCE_SECONDS)

        return super().do_open(Connection, req, **options)


class Http(KeptAlive, HTTPHandler):
    pass


class Https(KeptAlive, HTTPSHandler):
    pass


def read_url(url: str) -> str:
    """The server's address, also from the one that OpenAI's clients take. Ends the command with a message if it is not
    a URL."""
    if not url.startswith(("http://", "https://")):
        raise typer.BadParameter("write http://HOST:PORT, or https://HOST:PORT if it speaks TLS", param_hint="--url")
    return url.rstrip("/").removesuffix("/v1")


def open_url(request: Request, seconds: float) -> Any:
    """The answer, if something comes within so many seconds. A proxy of the environment is used for other machines.
    Raises what urllib.request.urlopen raises."""
    proxies = ProxyHandler({} if urlsplit(request.full_url).hostname in LOCAL else None)
    return build_opener(Http, Https, proxies).open(request, timeout=seconds)
