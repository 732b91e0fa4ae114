"""A model hub on loopback that answers huggingface_hub's requests: revisions, listings and files.

    with StandInHub() as hub:
        commit = hub.push("org/adapter", {"adapter_config.json": b"..."})
        HfApi(endpoint=hub.url).model_info("org/adapter")

It refuses requests like the real hub: without a token, even the existence of private repositories is hidden; a valid
token that may not read them gets a 404.
"""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/(?P<repo>.+?)(?:/(?P<kind>revision|tree)/(?P<revision>[^/]+).*)?")
_FILE = re.compile(r"/(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
_RANGE = re.compile(r"bytes=(\d+)-")
HANG_SECONDS = 3600.0


@dataclass
class _Repository:
    tokens: frozenset[str]  # who may read it; empty: everyone
    gated: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


class StandInHub:
    """Runs during its `with` block. `requests` lists the requests as "METHOD /path", in order of arrival."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.delay_s = 0.0  # before each answer
        self.failure: int | None = None  # the status of all answers, if set
        self.busy = 0  # the number of the next requests that are answered with 503
        self.retry_after = ""  # what such answers say
        self.damaged = 0  # the number of the next large files with a wrong byte
        self._repositories: dict[str, _Repository] = {}
        self._hurry = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler_of(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        """The value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def push(
        self,
        repo: str,
        files: Mapping[str, bytes],
        branch: str = "main",
        tokens: frozenset[str] = frozenset(),
        gated: bool = False,
    ) -> str:
        """Replaces the files of a branch. Returns the commit. With `tokens`, only these may read the repository."""
        repository = self._repositories.setdefault(repo, _Repository(tokens, gated))
        digest = hashlib.sha1(repr((sorted(files.items()), len(repository.commits))).encode())
        commit = digest.hexdigest()
        repository.commits[commit] = dict(files)
        repository.branches[branch] = commit
        return commit

    def hang(self) -> None:
        """Answers nothing until `release`."""
        self._hurry.clear()
        self.delay_s = HANG_SECONDS

    def release(self) -> None:
        """Ends the delay, also for requests that are waiting."""
        self._hurry.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hurry.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, method: str, path: str, headers: Mapping[str, str]) -> "Answer":
        self.requests.append(f"{method} {path}")
        self._hurry.wait(self.delay_s)
        if self.failure is not None:
            return Answer(self.failure, self._later())
        if self.busy:
            self.busy -= 1
            return Answer(503, self._later())
        match = _FILE.fullmatch(path) or _API.fullmatch(path)
        if match is None:
            return Answer(404)
        parts = match.groupdict()
        repository = self._repositories.get(parts["repo"])
        if refusal := self._refusal(repository, headers.get("authorization", "").removeprefix("Bearer ")):
            return refusal
        assert repository is not None
        found = repository.files(unquote(parts["revision"] or "main"))
        if found is None:
            return Answer(404, {"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        if "name" in parts:
            name = unquote(parts["name"])
            answer = _file(commit, name, files.get(name), headers)
            if self.damaged and method == "GET" and _is_large(parts["name"]):
                self.damaged -= 1
                return replace(answer, body=answer.body[:-1] + bytes([answer.body[-1] ^ 1]))
            return answer
        return _listing(parts["repo"], commit, files, parts["kind"])

    def _later(self) -> dict[str, str]:
        return {"Retry-After": self.retry_after} if self.retry_after else {}

    def _refusal(self, repository: _Repository | None, token: str) -> "Answer | None":
        known = {token for repository in self._repositories.values() for token in repository.tokens}
        if token and token not in known:
            return Answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if repository is None or (repository.tokens and token not in repository.tokens):
            return Answer(404 if token else 401, {"X-Error-Code": "RepoNotFound"})
        if repository.gated:
            return Answer(403, {"X-Error-Code": "GatedRepo"})
        return None


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


def _listing(repo: str, commit: str, files: Mapping[str, bytes], kind: str | None) -> Answer:
    if kind == "tree":
        content: object = [
            {"type": "file", "path": name, "size": len(data), "oid": _etag(name, data)} for name, data in files.items()
        ]
    else:
        siblings = [{"rfilename": name, "size": len(data), "blobId": _etag(name, data)} for name, data in files.items()]
        content = {"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings}
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())


def _file(commit: str, name: str, data: bytes | None, headers: Mapping[str, str]) -> Answer:
    about = {"X-Repo-Commit": commit}
    if data is None:
        return Answer(404, {**about, "X-Error-Code": "EntryNotFound"})
    about |= {"ETag": f'"{_etag(name, data)}"', "Accept-Ranges": "bytes"}
    if match := _RANGE.fullmatch(headers.get("range", "")):
        start = int(match[1])
        return Answer(206, {**about, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, data[start:])
    return Answer(200, about, data)


def _etag(name: str, data: bytes) -> str:
    """The sha256 of a file in LFS, git's name of any other."""
    if _is_large(name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_large(name: str) -> bool:
    return name.endswith(".safetensors")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignores clients that did not wait for their answer."""


def _handler_of(hub: StandInHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = self._answer()
            self.wfile.write(answer.body)

        def do_HEAD(self) -> None:
            self._answer()

        def _answer(self) -> Answer:
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = hub.answer(self.command, urlsplit(self.path).path, headers)
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            return answer

        def log_message(self, format: str, *args: object) -> None:
            """Tests read `requests`, so nothing is printed."""

    return Handler
