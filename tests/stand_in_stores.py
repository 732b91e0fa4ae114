"""Object stores on loopback: S3, Google Cloud Storage and Azure Blob Storage, as far as obstore needs them.

    with StandInS3(monkeypatch) as store:
        store.objects["bucket/folder/adapter_config.json"] = b"..."

Requests without the credentials that a store sets in the environment are refused, as are requests for `hidden` objects.
"""

import base64
import hashlib
import json
import ssl
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from email.utils import parsedate_to_datetime
from http.server import ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import google_crc32c
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.stand_in_writes import Objects, Writes

SECRET = "c2VjcmV0LXRoYXQtbm8tbWVzc2FnZS1zaG93cw=="
CREATED = "Wed, 21 Oct 2015 07:28:00 GMT"
# The user's variables that would select other stores or credentials.
FOREIGN = (
    *("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    *("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "AZURE_STORAGE_SAS_TOKEN"),
)


class StandInStore(ABC):
    """Runs during its `with` block. `requests` lists the requests as "METHOD bucket/key", in order."""

    scheme = ""
    authorization = ""  # the beginning of the header of clients that may read
    signature = "no signature"  # in the address of clients that may read

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tls: ssl.SSLContext | None = None) -> None:
        self.objects = Objects()
        self.hidden: set[str] = set()
        self.conditional = True  # whether it honours conditions of writes
        self.listed = True  # whether it lists objects
        self.requests: list[str] = []
        self.failure: int | None = None  # the status of all answers, if set
        self.busy = 0  # the number of the next requests that are answered with 503
        self.damaged = 0  # the number of the next objects with a wrong byte
        self.salt = b""  # before the content of an object whose ETag is not the content's MD5
        self.more_headers: dict[str, str] = {}  # of all objects
        self.cut: int | None = None  # the number of bytes after which the first answer with an object breaks off
        self._answers = threading.Event()  # else it hangs
        self._answers.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        for name in FOREIGN:
            monkeypatch.delenv(name, raising=False)
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self._server.server_port}"
        for name, value in self.environment(self.url).items():
            monkeypatch.setenv(name, value)

    @abstractmethod
    def environment(self, url: str) -> dict[str, str]:
        """The variables with the store's address and credentials."""

    @abstractmethod
    def listing(self, objects: Iterable[tuple[str, bytes, str]]) -> str:
        """The listing as XML. Objects: their names, contents and times of change."""

    def tag(self, data: bytes) -> str:
        """The ETag of an object."""
        return f'"{hashlib.md5(self.salt + data).hexdigest()}"'

    def checksums(self, data: bytes) -> dict[str, str]:
        """The headers of an object that have checksums."""
        return {}

    def push(self, folder: str, files: dict[str, bytes]) -> None:
        self.objects.update({f"{folder}/{name}": data for name, data in files.items()})

    def hang(self) -> None:
        """Answers nothing until `release`."""
        self._answers.clear()

    def release(self) -> None:
        self._answers.set()

    def wait(self) -> None:
        """Returns once it answers."""
        self._answers.wait()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class StandInS3(StandInStore):
    scheme, authorization = "s3", "AWS4-HMAC-SHA256 Credential=AKIDSTANDIN/"
    signature = "X-Amz-Credential=AKIDSTANDIN"

    def environment(self, url: str) -> dict[str, str]:
        keys = {"AWS_ACCESS_KEY_ID": "AKIDSTANDIN", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "eu-central-1"}
        return {"AWS_ENDPOINT_URL_S3": url, **keys}

    def listing(self, objects: Iterable[tuple[str, bytes, str]]) -> str:
        entries = (
            f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>{escape(self.tag(data))}</ETag>"
            f"<LastModified>{parsedate_to_datetime(changed).isoformat()}</LastModified></Contents>"
            for key, data, changed in objects
        )
        return f"<ListBucketResult>{''.join(entries)}</ListBucketResult>"


class StandInGCS(StandInS3):
    """Its XML API lists like S3."""

    scheme, authorization, signature = "gs", f"Bearer {SECRET}", "no signature"

    def environment(self, url: str) -> dict[str, str]:
        return {"GOOGLE_BASE_URL": url, "GOOGLE_BEARER_TOKEN": SECRET}


class StandInComposedGCS(StandInGCS):
    """Of objects that are composed of parts, for a service account, which signs addresses by itself."""

    authorization, signature = "Bearer ey", "X-Goog-Credential=standin@example.com"

    def environment(self, url: str) -> dict[str, str]:
        key = rsa.generate_private_key(65537, 2048)
        form = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        account = {"private_key": key.private_bytes(*form).decode(), "private_key_id": "1", "gcs_base_url": url}
        return {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps({**account, "client_email": "standin@example.com"})}

    def tag(self, data: bytes) -> str:
        return f'"CK{len(data)}=="'

    def checksums(self, data: bytes) -> dict[str, str]:
        return {"x-goog-hash": f"crc32c={base64.b64encode(google_crc32c.value(data).to_bytes(4)).decode()}"}


class StandInAzure(StandInStore):
    scheme, authorization, signature = "az", "SharedKey standin:", "sig="

    def checksums(self, data: bytes) -> dict[str, str]:
        return {"Content-MD5": base64.b64encode(hashlib.md5(data).digest()).decode()}

    def environment(self, url: str) -> dict[str, str]:
        account = {"AZURE_STORAGE_ACCOUNT_NAME": "standin", "AZURE_STORAGE_ACCOUNT_KEY": SECRET}
        return {"AZURE_STORAGE_ENDPOINT": url, **account}

    def listing(self, objects: Iterable[tuple[str, bytes, str]]) -> str:
        """The real store lists ETags without quotes."""
        entries = (
            f"<Blob><Name>{escape(key)}</Name><Properties><Last-Modified>{changed}</Last-Modified>"
            f"<Etag>{self.tag(data)[1:-1]}</Etag><Content-Length>{len(data)}</Content-Length>"
            "<Content-Type>application/octet-stream</Content-Type></Properties></Blob>"
            for key, data, changed in objects
        )
        return f"<EnumerationResults><Blobs>{''.join(entries)}</Blobs><NextMarker/></EnumerationResults>"


def _handler_of(store: StandInStore) -> type[Writes]:
    class Handler(Writes):
        protocol_version = "HTTP/1.1"
        objects = store.objects

        def tag(self, data: bytes) -> str:
            return store.tag(data)

        def conditional(self) -> bool:
            return store.conditional

        def refused(self) -> int:
            store.wait()
            store.requests.append(f"{self.command} {unquote(urlsplit(self.path).path).lstrip('/')}")
            return self._trouble()

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            store.wait()
            address = urlsplit(self.path)
            key, query = unquote(address.path).lstrip("/"), parse_qs(address.query)
            if "list-type" in query or query.get("comp") == ["list"]:
                return self._list(key.rstrip("/"), query["prefix"][0])
            store.requests.append(f"{self.command} {key}")
            status, data = self._find(key)
            etag, first, end = store.tag(data), 0, len(data)
            if requested := self.headers.get("Range"):
                start, _, last = requested.removeprefix("bytes=").partition("-")
                first, end = int(start), min(end, int(last) + 1) if last else end
                status = 206 if status == 200 else status
            self.send_response(status)
            self.send_header("Content-Length", str(end - first))
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(data)}")
            self.send_header("ETag", etag)
            self.send_header("x-goog-generation", str(store.objects.version(key)))
            for name, value in (store.more_headers | store.checksums(data)).items():
                self.send_header(name, value)
            self.send_header("Last-Modified", store.objects.changed(key, CREATED))
            self.end_headers()
            if self.command == "GET":
                sent, store.cut = store.cut, None
                if store.damaged and status < 300:
                    store.damaged -= 1
                    data = data[:-1] + bytes([data[-1] ^ 1])
                self.wfile.write(data[first : end if sent is None else min(end, sent)])
                self.close_connection = sent is not None

        def _list(self, bucket: str, prefix: str) -> None:
            store.requests.append(f"LIST {bucket}/{prefix}")
            begin, skipped = f"{bucket}/{prefix}", len(bucket) + 1
            named = [(key, data) for key, data in sorted(store.objects.items()) if key.startswith(begin)]
            found = [(key[skipped:], data, store.objects.changed(key, CREATED)) for key, data in named]
            status = store.failure or (200 if store.listed and self._may_read() else 403)
            code = "AccessDenied" if self._may_read() else "AuthenticationFailed"
            data = store.listing(found).encode() if status == 200 else f"<Error><Code>{code}</Code></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _may_read(self) -> bool:
            signed = store.signature in unquote(self.path)
            return signed or self.headers.get("Authorization", "").startswith(store.authorization)

        def _trouble(self) -> int:
            if store.failure is not None:
                return store.failure
            if store.busy:
                store.busy -= 1
                return 503
            return 0 if self._may_read() else 403

        def _find(self, key: str) -> tuple[int, bytes]:
            if status := self._trouble():
                return status, b""
            if key in store.hidden:
                return 403, b""
            if key not in store.objects:
                return 404, b""
            expected = self.headers.get("If-Match")
            if expected is not None and expected != store.tag(store.objects[key]):
                return 412, b""
            return 200, store.objects[key]

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
