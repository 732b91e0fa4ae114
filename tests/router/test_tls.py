"""TLS on the ports that clients use."""

import asyncio
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
import trustme
from pydantic import ValidationError

from loraplex import AsyncClient, UnavailableError
from loraplex_router.access import followed_file
from loraplex_router.api.tls import Tls
from loraplex_router.app import Router
from loraplex_router.settings import RouterSettings
from loraplex_router.telemetry.request_log import RequestLog
from loraplex_router.telemetry.telemetry import Telemetry

SHARDS = ("unix:/nowhere",)


def issue(authority: trustme.CA, folder: Path) -> tuple[Path, Path]:
    """A new certificate for localhost, and its key."""
    leaf = authority.issue_cert("localhost")
    cert, key = folder / "tls.crt", folder / "tls.key"
    leaf.cert_chain_pems[0].write_to_path(cert)
    leaf.private_key_pem.write_to_path(key)
    return cert, key


async def test_both_ports_speak_tls_alone_and_with_renewed_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followed_file, "LOOK_SECONDS", 0.01)
    authority = trustme.CA()
    cert, key = issue(authority, tmp_path)
    settings = RouterSettings(shards=SHARDS, http_port=0, tls_cert=cert, tls_key=key)
    router = Router(settings, None, Telemetry(1, RequestLog(prompts=False)))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    assert router._tls is not None
    following = asyncio.create_task(router._tls.follow())
    async with router._http() as http_port:

        def fetch(scheme: str) -> int:
            with urllib.request.urlopen(f"{scheme}://localhost:{http_port}/version", context=trusting) as response:
                return response.status

        assert await asyncio.to_thread(fetch, "https") == 200
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            await asyncio.to_thread(fetch, "http")
        grpc_port = await router._grpc.start("127.0.0.1", 0)
        authorities = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        async with AsyncClient(f"https://localhost:{grpc_port}", credentials=authorities, max_retries=0) as client:
            with pytest.raises(UnavailableError, match="no replica is ready"):
                await client.info()
        async with AsyncClient(f"localhost:{grpc_port}", max_retries=0) as client:
            with pytest.raises(
                UnavailableError, match=r"no server answers at localhost:.*if it speaks TLS, write https"
            ):
                await client.info()
        async with AsyncClient(f"https://localhost:{grpc_port}", max_retries=0) as client:
            with pytest.raises(UnavailableError, match=r"the certificate of https://localhost:.* is not trusted: give"):
                await client.info()
        async with AsyncClient(f"127.0.0.1:{grpc_port}", credentials=authorities, max_retries=0) as client:
            with pytest.raises(UnavailableError, match=r"the certificate of 127.0.0.1:.* is for another name"):
                await client.info()

        def shown(port: int) -> str:
            return ssl.get_server_certificate(("localhost", port))

        key.write_text("half of the renewal")
        await asyncio.sleep(0.1)
        issue(authority, tmp_path)
        async with asyncio.timeout(60):
            for port in http_port, grpc_port:
                while await asyncio.to_thread(shown, port) not in cert.read_text().replace("\r", ""):
                    await asyncio.sleep(0.01)
        await router._grpc.stop(0)
    following.cancel()


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    cert, _ = issue(trustme.CA(), tmp_path)
    with pytest.raises(OSError, match="--tls-cert, --tls-key: a file cannot be read: No such file"):
        Tls(cert, tmp_path / "absent")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(OSError, match="cannot be used: key values mismatch"):
        Tls(cert, issue(trustme.CA(), other)[1])
    with pytest.raises(ValidationError, match="set both tls_cert and tls_key"):
        RouterSettings(shards=SHARDS, tls_cert=cert)
