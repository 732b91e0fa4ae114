"""Adapters in S3, Google Cloud Storage or Azure Blob Storage, or in a store with the same protocol. An id is the name
of a folder below a bucket and prefix, or the whole address of such a folder.

Credentials, region and endpoint are the server's. obstore finds them in variables, a pod's identity or a machine's
role. They never appear in a message.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import obstore
from obstore.exceptions import BaseError, GenericError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import from_url

from loraplex_protos.adapter_names import is_name
from loraplex_protos.errors import (
    AdapterError,
    AdapterForbiddenError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterSourceError,
    quote,
)
from loraplex_shard.lora.sources.aws_profile import read_profile
from loraplex_shard.lora.sources.files import CONFIG, KNOWN, MLX_TENSORS, TENSORS, check_size, is_telling, new_buffer
from loraplex_shard.lora.sources.protocol import File, Origin, Source

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, RetryConfig


class _Kind(NamedTuple):
    name: str
    title: str
    schemes: tuple[str, ...]  # of addresses; the first one is used in settings


KINDS = (
    _Kind("s3", "S3", ("s3",)),
    _Kind("gcs", "Google Cloud Storage", ("gs",)),
    _Kind("azure", "Azure Blob Storage", ("az", "azure", "abfs", "abfss")),
)
CHUNK = 2**22  # bytes copied at a time
PAGE, MOST_LISTED = 1000, 10_000  # objects
LONGEST_READ = timedelta(hours=1)

# Parts of obstore's error messages.
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_ASKED = re.compile(r"Error performing [A-Z]+ (http\S+)")
_LOGIN = re.compile(r"Error performing P|token re(quest|sponse)")  # sources never send a POST or PUT
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_TROUBLES = {
    "kind: Connect": "it cannot be reached",
    "kind: Timeout": "it does not answer",
    "BareRedirect": "the bucket is in another region (AWS_REGION)",
}


class ObjectStoreSource(Source):
    """The adapters under `url`, s3://BUCKET or s3://BUCKET/PREFIX, and so on.

    `timeout_s` is the limit for a connection, and for each next piece of an answer. Raises ValueError for settings in
    the environment that are wrong or insufficient.
    """

    def __init__(self, url: str, timeout_s: float = 10.0) -> None:
        scheme, path = url.split("://")
        self._kind = next(kind for kind in KINDS if scheme in kind.schemes)
        self.name = self._kind.name
        self._bucket, _, prefix = path.partition("/")
        self._prefix = f"{prefix.strip('/')}/".lstrip("/")
        wait = timedelta(seconds=timeout_s)
        client: ClientConfig = {"allow_http": True, "connect_timeout": wait, "read_timeout": wait}
        retries: RetryConfig = {"max_retries": 2, "retry_timeout": 3 * wait}
        options = read_profile() if self.name == "s3" else {}
        address = f"{scheme}://{self._bucket}"
        try:
            client |= {"timeout": LONGEST_READ, "root_certificate": _authorities()}
            self._store = from_url(address, client_options=client, retry_config=retries, **options)
        except (BaseError, OSError) as error:
            raise ValueError(str(error).partition("\n")[0][:200]) from None

    def refusal(self, id: str) -> str:
        if is_name(self._named(id)):
            return ""
        if id.partition("://")[0] in self._kind.schemes:
            return f"{quote(id)} is not a name under this server's --adapters-{self.name}"
        return f"{self._kind.title} has no adapter {quote(id)}"

    def locate(self, id: str, revision: str, token: str) -> Origin:
        if refusal := self.refusal(id):
            raise AdapterNotFoundError(refusal)
        if revision:
            raise AdapterNotFoundError(f"{self._kind.title} has no revisions: omit the revision of {quote(id)}")
        id = self._named(id)
        with self._typed_errors(id):
            found = self._find(f"{self._prefix}{id}")
        if not found:
            raise AdapterNotFoundError(f"{self._kind.title} has no adapter {quote(id)}")
        return Origin.of(self, id, found)

    def read(self, origin: Origin) -> dict[str, memoryview]:
        with self._typed_errors(origin.id):
            return {name: self._get(name, file) for name, file in origin.files}

    def _get(self, name: str, file: File) -> memoryview:
        answer = obstore.get(self._store, file.place, options={"if_match": file.version})
        check_size(name, answer.meta["size"])
        data, filled = new_buffer(answer.meta["size"]), 0
        for chunk in answer.stream(CHUNK):
            data[filled : filled + len(chunk)] = memoryview(chunk)
            filled += len(chunk)
        return data

    def _named(self, id: str) -> str:
        """The adapter's name. The id may be its address; an address of another place stays as it is."""
        scheme, _, path = id.partition("://")
        root = f"{self._bucket}/{self._prefix}"
        ours = scheme in self._kind.schemes and path.startswith(root)
        return path.removeprefix(root).removesuffix("/") if ours else id

    def _find(self, folder: str) -> dict[str, File]:
        """The objects of an adapter's folder that matter for the adapter, by name."""
        try:
            return self._list(folder)
        except BaseError as error:
            if _status(error) != 403:
                raise
            try:
                return self._ask(folder)
            except PermissionDeniedError:
                raise error from None  # the first error says more

    def _list(self, folder: str) -> dict[str, File]:
        found, listed = dict[str, File](), 0
        for page in obstore.list(self._store, folder, chunk_size=PAGE):
            listed += len(page)
            if listed > MOST_LISTED:
                raise AdapterInvalidError(f"there are more than {MOST_LISTED} objects in the adapter's folder")
            names = {object["path"].removeprefix(f"{folder}/"): object for object in page}
            found |= {name: _file(object) for name, object in names.items() if is_telling(name)}
        return found

    def _ask(self, folder: str) -> dict[str, File]:
        """Asks for each file by its name, if the server may read the bucket but not list it. Named templates are not
        found in this way, and a missing file looks like one that may not be read."""
        found, refused = dict[str, File](), None
        for name in KNOWN:
            try:
                found[name] = _file(obstore.head(self._store, f"{folder}/{name}"))
            except (BaseError, FileNotFoundError) as error:
                if _status(error) not in (403, 404):
                    raise
                refused = error if _status(error) == 403 else refused
        if refused and (CONFIG not in found or found.keys().isdisjoint((TENSORS, MLX_TENSORS))):
            raise refused
        return found

    @contextmanager
    def _typed_errors(self, id: str) -> Iterator[None]:
        """Turns obstore's errors into ours. Their messages are not passed on, since they may contain secrets."""
        try:
            yield
        except (BaseError, FileNotFoundError, ValueError) as error:
            raise self._typed(error, id) from None

    def _typed(self, error: Exception, id: str) -> AdapterError:
        title, text = self._kind.title, str(error)
        asked = _ASKED.search(text)
        if isinstance(error, GenericError) and (_LOGIN.search(text) or (asked and self._bucket not in asked[1])):
            return AdapterSourceError(f"cannot ask {title} for {quote(id)}: this server has no credentials for it")
        code = f" ({found[1]})" if (found := _CODE.search(text)) else ""
        match _status(error):
            case 401 | 403:
                return AdapterForbiddenError(
                    f"{title} does not let this server read {quote(id)}{code}; without the right to list the bucket,"
                    " this may also mean that it does not exist"
                )
            case 404:
                return AdapterNotFoundError(f"{title} has no adapter {quote(id)}, or no such bucket")
            case 412:
                return AdapterSourceError(f"the files of {quote(id)} changed while they were read: try again")
            case 0:
                reason = next((said for sign, said in _TROUBLES.items() if sign in text), "its answer is malformed")
                return AdapterSourceError(f"{title} did not hand over {quote(id)}: {reason}")
            case status:
                return AdapterSourceError(f"{title} answered {status}{code} for {quote(id)}")


def _authorities() -> bytes:
    """Certificates to trust in addition to the system's, as PEM."""
    file = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    return Path(file).read_bytes() if file else b""


def _file(object: "ObjectMeta") -> File:
    etag = object["e_tag"] or ""
    return File(object["path"], etag if '"' in etag else f'"{etag}"', object["size"])  # Azure lists tags without quotes


def _status(error: Exception) -> int:
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
