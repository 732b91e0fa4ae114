"""How the stand-ins of object stores are written to: whole objects with conditions, and in parts."""

import re
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from time import time
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import unescape


class Objects(dict[str, bytes]):
    """Objects by name, with the time of their last change by the store's clock, and a number for each version."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ahead = 0.0  # seconds, of the store's clock
        self._changed: dict[str, tuple[int, float]] = {}
        self.uploads: dict[str, dict[str, bytes]] = {}  # parts by number, of uploads that are not complete

    def put(self, name: str, data: bytes) -> None:
        self[name] = data
        self._changed[name] = self.version(name) + 1, time() + self.ahead

    def version(self, name: str) -> int:
        return self._changed.get(name, (0, 0.0))[0]

    def changed(self, name: str, since: str) -> str:
        """As HTTP has it. `since`: of objects that a test has put there."""
        return formatdate(self._changed[name][1], usegmt=True) if name in self._changed else since

    def age(self, name: str, seconds: float) -> None:
        number, changed = self._changed[name]
        self._changed[name] = number, changed - seconds


class Writes(BaseHTTPRequestHandler):
    """`objects` and `may_write` are the stand-in's."""

    objects: Objects

    def refused(self) -> int:
        """The status of a request that is not answered."""
        raise NotImplementedError

    def tag(self, data: bytes) -> str:
        raise NotImplementedError

    def conditional(self) -> bool:
        """Whether the store honours conditions."""
        raise NotImplementedError

    def do_PUT(self) -> None:
        key, query, data = self._read()
        if status := self.refused():
            return self._reply(status)
        with self.objects.lock:
            if "uploadId" in query:
                self.objects.uploads[query["uploadId"][0]][query["partNumber"][0]] = data
                return self._reply(200, data=data)
            if query.get("comp") == ["block"]:  # Azure's
                self.objects.uploads.setdefault(key, {})[query["blockid"][0]] = data
                return self._reply(201)
            if query.get("comp") == ["blocklist"]:
                parts = self.objects.uploads.pop(key, {})
                data = b"".join(parts[id] for id in re.findall(r"<\w+>([^<]+)</(?:Uncommitted|Latest)>", data.decode()))
            elif status := self._unmet(key):
                return self._reply(status)
            self.objects.put(key, data)
            self._reply(201 if self.headers.get("x-ms-version") else 200, key, data)

    def do_POST(self) -> None:
        key, query, data = self._read()
        if status := self.refused():
            return self._reply(status)
        with self.objects.lock:
            if "uploads" in query:
                id = f"{len(self.objects.uploads)}-{key}"
                self.objects.uploads[id] = {}
                return self._reply(200, text=f"<A><UploadId>{id}</UploadId></A>")
            if "delete" in query:
                names = re.findall(r"<Key>([^<]+)</Key>", data.decode())
                for name in names:
                    self.objects.pop(f"{key.rstrip('/')}/{unescape(name)}", None)
                gone = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
                return self._reply(200, text=f"<DeleteResult>{gone}</DeleteResult>")
            if query.get("comp") == ["batch"]:
                return self._delete_blobs(re.findall(r"DELETE /(\S+?)(?:\?\S*)? HTTP", data.decode()))
            parts = self.objects.uploads.pop(query["uploadId"][0])
            whole = b"".join(parts[number] for number in re.findall(r"<PartNumber>(\d+)</PartNumber>", data.decode()))
            self.objects.put(key, whole)
            self._reply(200, key, text=f"<A><ETag>{self.tag(whole)}</ETag></A>")

    def do_DELETE(self) -> None:
        key, query, _ = self._read()
        if status := self.refused():
            return self._reply(status)
        with self.objects.lock:
            if "uploadId" in query:
                self.objects.uploads.pop(query["uploadId"][0], None)
                return self._reply(204)
            found = self.objects.pop(key, None)
        self._reply(202 if self.headers.get("x-ms-version") else 204 if found is not None else 404)

    def _delete_blobs(self, names: list[str]) -> None:
        """Azure's answer has a part for each."""
        found = [self.objects.pop(unquote(name), None) is not None for name in names]
        text = "".join(
            f"--next\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\n"
            f"HTTP/1.1 {'202 Accepted' if here else '404 BlobNotFound'}\r\nContent-Length: 0\r\n\r\n\r\n"
            for number, here in enumerate(found)
        )
        self._reply(202, text=f"{text}--next--\r\n", kind="multipart/mixed; boundary=next")

    def _unmet(self, key: str) -> int:
        """The status if the request has a condition that is not met, else 0."""
        if not self.conditional():
            return 0
        here = self.objects.get(key)
        if self.headers.get("If-None-Match") == "*" and here is not None:
            return 409 if self.headers.get("x-ms-version") else 412
        if (tag := self.headers.get("If-Match")) is not None:
            return 404 if here is None else 0 if tag == self.tag(here) else 412
        generation = self.headers.get("x-goog-if-generation-match")
        now = 0 if here is None else self.objects.version(key)
        return 0 if generation is None or int(generation) == now else 412

    def _read(self) -> tuple[str, dict[str, list[str]], bytes]:
        address = urlsplit(self.path)
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return unquote(address.path).lstrip("/"), parse_qs(address.query, keep_blank_values=True), data

    def _reply(
        self, status: int, key: str = "", data: bytes = b"", text: str = "", kind: str = "application/xml"
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("ETag", self.tag(data))
        if key:
            self.send_header("x-goog-generation", str(self.objects.version(key)))
        self.end_headers()
        self.wfile.write(text.encode())
