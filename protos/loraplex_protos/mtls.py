"""Mutual TLS between router and shards: the settings, which both sides share, and gRPC credentials from them."""

from pathlib import Path
from typing import Self

import grpc
from pydantic import BaseModel, Field, model_validator


class MtlsSettings(BaseModel):
    """All three files, in PEM, or none. Every new connection reads them again, so that they can be renewed."""

    mtls_cert: Path | None = Field(
        None, description="This side's certificate for the connections between router and shards, in PEM."
    )
    mtls_key: Path | None = Field(None, description="The private key of --mtls-cert, in PEM.")
    mtls_ca: Path | None = Field(
        None,
        description="The authority, in PEM, that must have signed the other side's certificate. Without these three "
        "files the connections are not encrypted.",
    )

    @model_validator(mode="after")
    def _names_all_files_or_none(self) -> Self:
        given = {"mtls_cert": self.mtls_cert, "mtls_key": self.mtls_key, "mtls_ca": self.mtls_ca}
        absent = [name for name, path in given.items() if path is None]
        if absent and len(absent) < len(given):
            raise ValueError(f"{absent[0]}: set all of {', '.join(given)}, or none")
        for name, path in given.items():
            if path is not None and not path.is_file():
                raise ValueError(f"{name}: file not found: {path}")
        return self


def channel_credentials(settings: MtlsSettings) -> grpc.ChannelCredentials | None:
    """Credentials for the connecting side; None without mTLS. Raises OSError if a file cannot be read."""
    if settings.mtls_cert is None:
        return None
    cert, key, ca = _read(settings)
    return grpc.ssl_channel_credentials(ca, key, cert)


def server_credentials(settings: MtlsSettings) -> grpc.ServerCredentials | None:
    """Credentials for the listening side, which refuses clients without a certificate; None without mTLS.

    Raises OSError if a file cannot be read.
    """

    if settings.mtls_cert is None:
        return None

    def read() -> grpc.ServerCertificateConfiguration:
        cert, key, ca = _read(settings)
        return grpc.ssl_server_certificate_configuration([(key, cert)], ca)

    return grpc.dynamic_ssl_server_credentials(read(), read, require_client_authentication=True)


def _read(settings: MtlsSettings) -> tuple[bytes, bytes, bytes]:
    """Certificate, key and authority."""
    assert settings.mtls_cert and settings.mtls_key and settings.mtls_ca
    return settings.mtls_cert.read_bytes(), settings.mtls_key.read_bytes(), settings.mtls_ca.read_bytes()
