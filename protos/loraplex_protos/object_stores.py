"""Object stores, as shards and routers open them: S3, Google Cloud Storage and Azure Blob Storage, or stores with the
same protocol.

Credentials, region and endpoint are the server's. obstore finds them in variables, a pod's identity or a machine's
role. They never appear in a message.
"""

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from obstore.exceptions import BaseError, GenericError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, S3Store, from_url

from loraplex_protos.aws_profile import read_profile

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig


class Kind(NamedTuple):
    name: str
    title: str
    schemes: tuple[str, ...]  # of addresses; the first one is used in settings


KINDS = (
    Kind("s3", "S3", ("s3",)),
    Kind("gcs", "Google Cloud Storage", ("gs",)),
    Kind("azure", "Azure Blob Storage", ("az", "azure", "abfs", "abfss")),
)
LONGEST_REQUEST = timedelta(hours=1)

# Parts of obstore's error messages.
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_ASKED = re.compile(r"Error performing [A-Z]+ (http\S+)")
_LOGIN = re.compile(r"token re(quest|sponse)")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_TROUBLES = {
    "kind: Connect": "it cannot be reached",
    "kind: Timeout": "it does not answer",
    "BareRedirect": "the bucket is in another region (AWS_REGION)",
}


class Place(NamedTuple):
    """Where objects are. `prefix` is empty, or ends with a slash."""

    kind: Kind
    bucket: str
    prefix: str

    @classmethod
    def at(cls, url: str) -> Self:
        """`url`: s3://BUCKET or s3://BUCKET/PREFIX, and so on."""
        scheme, path = url.split("://")
        bucket, _, prefix = path.partition("/")
        return cls(next(kind for kind in KINDS if scheme in kind.schemes), bucket, f"{prefix.strip('/')}/".lstrip("/"))

    def open(self, timeout_s: float) -> S3Store | GCSStore | AzureStore:
        """The bucket. Nothing is tried again. `timeout_s` is the limit for a connection, and for each next piece of an
        answer. Raises ValueError for settings in the environment that are wrong or insufficient."""
        wait = timedelta(seconds=timeout_s)
        client: ClientConfig = {"allow_http": True, "connect_timeout": wait, "read_timeout": wait}
        retries: RetryConfig = {"max_retries": 0}
        options = read_profile() if self.kind.name == "s3" else {}
        address = f"{self.kind.schemes[0]}://{self.bucket}"
        try:
            client |= {"timeout": LONGEST_REQUEST}
            if trusted := authorities():
                client |= {"root_certificate": trusted}
            store = from_url(address, client_options=client, retry_config=retries, **options)
        except (BaseError, OSError) as error:
            raise ValueError(str(error).partition("\n")[0][:200]) from None
        assert isinstance(store, S3Store | GCSStore | AzureStore)
        return store

    def lacks_credentials(self, error: Exception) -> bool:
        """Whether it is an error of the login, not of the bucket itself."""
        text = str(error)
        asked = _ASKED.search(text)
        return isinstance(error, GenericError) and bool(_LOGIN.search(text) or (asked and self.bucket not in asked[1]))


def authorities() -> bytes:
    """Certificates to trust in addition to the system's, as PEM."""
    file = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    return Path(file).read_bytes() if file else b""


def status_of(error: Exception) -> int:
    """The HTTP status of an error; 0 if there was no answer, or none that makes sense."""
    match error:
        case FileNotFoundError():
            return 404
        case PreconditionError():
            return 412
        case PermissionDeniedError() | UnauthenticatedError():
            return 403
    found = _STATUS.search(str(error))
    return int(found[1]) if found else 0


def code_of(error: Exception) -> str:
    """What the store calls an error, in parentheses and after a space; empty if it does not say."""
    found = _CODE.search(str(error))
    return f" ({found[1]})" if found else ""


def trouble_of(error: Exception) -> str:
    """Why there was no answer."""
    return next((said for sign, said in _TROUBLES.items() if sign in str(error)), "its answer is malformed")
