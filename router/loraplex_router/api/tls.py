"""TLS for the ports that clients use."""

import asyncio
import logging
import ssl
from pathlib import Path

import grpc

from loraplex_router.access import followed_file
from loraplex_router.access.followed_file import FollowedFile

logger = logging.getLogger(__name__)


class Tls:
    """A certificate and its key, which are read again when they are renewed. Raises OSError if they cannot be used."""

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert, self._key = cert, key
        self._file = FollowedFile(cert)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._load(self.context)

    def grpc_credentials(self) -> grpc.ServerCredentials:
        def read() -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration([(self._key.read_bytes(), self._cert.read_bytes())])

        return grpc.dynamic_ssl_server_credentials(read(), read, require_client_authentication=False)

    async def follow(self) -> None:
        """Serves HTTP with the renewed certificate, until cancelled. (gRPC looks for itself.)"""
        async for _ in self._file.changes():
            while not await self._reload():  # until its key is there, too
                await asyncio.sleep(followed_file.LOOK_SECONDS)

    async def _reload(self) -> bool:
        try:
            await self._file.run(self._load, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
            self._load(self.context)  # which connections use meanwhile
        except OSError as error:
            logger.error("keeping the previous certificate: %s", error)
            return False
        logger.info("reloaded the certificate of --tls-cert")
        return True

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            context.load_cert_chain(self._cert, self._key)
        except ssl.SSLError as error:
            reason = (error.reason or "they are not PEM").replace("_", " ").lower()
            raise OSError(f"--tls-cert, --tls-key: {self._cert} and {self._key} cannot be used: {reason}") from error
        except OSError as error:
            raise OSError(f"--tls-cert, --tls-key: a file cannot be read: {error.strerror}") from error
