"""Keeps web pages from other places away from a server without API keys, which does what anybody asks."""

from collections.abc import Callable, Sequence
from ipaddress import ip_address
from socket import gethostname
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex_protos.errors import ForbiddenError, LoraplexError, quote

# Domains that no page on the internet can be in: for special use, and what container engines call their host. Nor can
# such a page have a name without a dot.
PRIVATE = ("localhost", "local", "internal")


class ForeignPages:
    """An ASGI middleware. A browser names a page's origin in the header Origin, also where CORS forbids the page to
    read the answer; and a page whose own name leads to this machine (DNS rebinding) has that name in the header
    Host."""

    def __init__(
        self, app: ASGIApp, origins: Sequence[str], loopback: bool, refuse: Callable[[str, LoraplexError], ASGIApp]
    ) -> None:
        """`origins`: whose pages may call. `loopback`: only programs of this machine reach the server. `refuse` gives
        the answer on a path."""
        self._app = app
        self._origins = frozenset(origins)
        self._hosts = {urlsplit(origin).hostname for origin in origins} | {gethostname().lower()}
        self._loopback = loopback
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and (why := self._refusal(Headers(scope=scope))):
            app = self._refuse(scope["path"], ForbiddenError(why))
        await app(scope, receive, send)

    def _refusal(self, headers: Headers) -> str:
        """Why a page may not call. Empty if it may, or if no page does."""
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if origin and origin not in self._origins and origin.partition("://")[2] != host:
            return f"web pages of {quote(origin)} may not call this server: start it with --cors-origins, or --api-keys"
        name = _name(host)
        if self._loopback and not self._knows(name):
            return (
                f"requests to {quote(host)} are not answered: if a proxy sends them, start the server with "
                "--cors-origins https://HOST, or --api-keys"
            )
        return ""

    def _knows(self, host: str) -> bool:
        return "." not in host or host in self._hosts or host.split(".")[-1] in PRIVATE or is_address(host)


def _name(host: str) -> str:
    """Of a host with or without a port. One that is not a host is its own name."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # a bracket too few or too many
        return host


def is_address(host: str) -> bool:
    """Whether it is an IP address, not a name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach a server that listens there."""
    return host == "localhost" or (is_address(host) and ip_address(host).is_loopback)
