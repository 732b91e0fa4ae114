"""An S3 on loopback that speaks what boto3 asks of the real one to read objects.

    with StandInS3(monkeypatch) as s3:
        s3.objects["bucket/folder/adapter_config.json"] = b"..."

Requests without the credentials that it sets in the environment are refused, as are those for `hidden` objects.
"""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

KEY, SECRET = "AKIDSTANDIN", "a-secret-that-no-message-shows"


class StandInS3:
    """Runs while its `with` block does. `requests` lists what was asked, as "METHOD bucket/key", in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.objects: dict[str, bytes] = {}
        self.hidden: set[str] = set()
        self.listed = True  # whether it says which objects there are
        self.requests: list[str] = []
        self.failure: int | None = None  # a status to answer everything with
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        for name, value in {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "eu-central-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(name, value)

    def push(self, folder: str, files: dict[str, bytes]) -> None:
        self.objects |= {f"{folder}/{name}": data for name, data in files.items()}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler_of(store: StandInS3) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            address = urlsplit(self.path)
            key = unquote(address.path).lstrip("/")
            if "list-type=2" in address.query:
                return self._list(key.rstrip("/"), parse_qs(address.query)["prefix"][0])
            store.requests.append(f"{self.command} {key}")
            status, data = self._find(key)
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", _etag(data))
            self.end_headers()
            if with_body:
                self.wfile.write(data)

        def _list(self, bucket: str, prefix: str) -> None:
            """The objects directly under a prefix that ends with a slash."""
            store.requests.append(f"LIST {bucket}/{prefix}")
            begin = f"{bucket}/{prefix}"
            found = [key for key in store.objects if key.startswith(begin) and "/" not in key.removeprefix(begin)]
            entries = (
                f"<Contents><Key>{key.removeprefix(bucket + '/')}</Key><Size>{len(store.objects[key])}</Size>"
                f"<ETag>{_etag(store.objects[key])}</ETag></Contents>"
                for key in found
            )
            status = store.failure or (200 if store.listed else 403)
            data = f"<ListBucketResult>{''.join(entries)}</ListBucketResult>".encode() if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _find(self, key: str) -> tuple[int, bytes]:
            if store.failure is not None:
                return store.failure, b""
            if f"Credential={KEY}/" not in self.headers.get("Authorization", "") or key in store.hidden:
                return 403, b""
            if key not in store.objects:
                return 404, b""
            expected = self.headers.get("If-Match")
            if expected is not None and expected != _etag(store.objects[key]):
                return 412, b""
            return 200, store.objects[key]

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'
