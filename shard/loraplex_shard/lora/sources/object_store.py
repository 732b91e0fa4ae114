"""Adapters in S3, Google Cloud Storage or Azure Blob Storage, or in a store with the same protocol. An id is the name
of a folder below a bucket and prefix, or the whole address of such a folder.

What arrives is compared with the checksum that the store says: of S3 and Google Cloud Storage, the ETag where it is an
MD5, or in S3 one of parts; of Azure, Content-MD5; of what Google Cloud Storage has composed of parts, its CRC32C.
obstore compares nothing, and asks S3 for no x-amz-checksum: its header would have to be signed. Files are kept on this
machine's disk.
"""

import base64
import hashlib
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from email.message import Message
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.request import Request, urlopen

import google_crc32c
import obstore
from huggingface_hub import constants
from obstore.exceptions import BaseError, GenericError, PermissionDeniedError

from loraplex_protos.adapter_names import is_name
from loraplex_protos.errors import (
    AdapterError,
    AdapterForbiddenError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterSourceError,
    quote,
)
from loraplex_protos.object_stores import Place, authorities, code_of, status_of, trouble_of
from loraplex_shard.lora.sources.file_cache import FileCache
from loraplex_shard.lora.sources.files import CONFIG, KNOWN, MLX_TENSORS, TENSORS, is_telling
from loraplex_shard.lora.sources.parts import has_tag, is_of_parts
from loraplex_shard.lora.sources.patience import BUSY, Progress, SourceBusyError
from loraplex_shard.lora.sources.protocol import File, Origin, Source

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta


CHUNK = 2**22  # bytes copied at a time
PAGE, MOST_LISTED = 1000, 10_000  # objects
SIGNED_FOR = timedelta(minutes=1)
_MD5 = re.compile(r"[0-9a-f]{32}")
_CRC32C = re.compile(r"\bcrc32c=([\w+/]{6}==)")
_SENT = re.compile(r"Error performing P")  # in obstore's messages: sources never send a POST or PUT, but logins do


class ObjectStoreSource(Source):
    """The adapters under `url`, s3://BUCKET or s3://BUCKET/PREFIX, and so on.

    `cache`, where files are kept, defaults to a folder beside the hub's cache. `timeout_s` is the limit for a
    connection, and for each next piece of an answer. Raises ValueError for settings in the environment that are wrong
    or insufficient.
    """

    def __init__(self, url: str, timeout_s: float = 10.0, cache: Path | None = None) -> None:
        self._place = Place.at(url)
        self._kind, self._bucket, self._prefix = self._place
        self.name = self._kind.name
        self._cache = FileCache(cache or Path(constants.HF_HOME) / "object-stores")
        self._timeout_s = timeout_s
        self._unlike: dict[File, str] = {}  # the MD5 of what arrived last, which does not have the parts' ETag
        self._store = self._place.open(timeout_s)  # `patience.py` tries again

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

    def fetch(self, origin: Origin, progress: Progress) -> dict[str, Path]:
        paths: dict[str, Path] = {}
        progress.reach(0)
        with self._typed_errors(origin.id):
            for name, file in origin.files:
                before = progress.done

                def bring(output: IO[bytes], name: str = name, file: File = file) -> None:
                    self._download(file, output, progress)
                    self._compare(f"{name} of {quote(origin.id)}", file, output)

                key = f"{self.name}://{self._bucket}/{file.place} {file.version} {file.size}"
                paths[name] = self._cache.get(key, file.size, bring)
                progress.reach(before + file.size)
        return paths

    def _download(self, file: File, output: IO[bytes], progress: Progress) -> None:
        """Continues where the output ends."""
        arrived = output.tell()
        progress.reach(progress.done + arrived)
        if arrived >= file.size:
            return
        options: GetOptions = {"if_match": file.version}
        if arrived:
            options["range"] = {"offset": arrived}
        for chunk in obstore.get(self._store, file.place, options=options).stream(CHUNK):
            output.write(chunk)
            progress.reach(progress.done + len(chunk))

    def _compare(self, name: str, file: File, output: IO[bytes]) -> None:
        """Compares what has arrived with what the store says about it. Empties the output if it is not the same."""
        size = output.tell()
        if size != file.size:
            difference = f"it has {size} bytes", str(file.size)
        elif (found := self._other_checksum(file, output)) is None:
            return
        else:
            difference = found
        output.truncate(0)
        raise SourceBusyError(f"{name} arrived damaged: {difference[0]}, but {self._kind.title} says {difference[1]}")

    def _other_checksum(self, file: File, output: IO[bytes]) -> tuple[str, str] | None:
        """What the checksum is, and what the store says it is; None if it is the same, or is not known."""
        output.seek(0)
        got = hashlib.file_digest(output, "md5").hexdigest()  # type: ignore[arg-type]
        if said := self._md5_of(file, got):
            return None if said == got else (f"its MD5 is {got}", said)
        if self.name == "s3" and not self._has_tag_of_parts(file, output, got):
            return "its parts have another ETag", file.version
        hashes = ",".join(self._headers(file.place).get_all("x-goog-hash", ())) if self.name == "gcs" else ""
        if not (match := _CRC32C.search(hashes)):
            return None
        output.seek(0)
        crc = 0
        while chunk := output.read(CHUNK):
            crc = google_crc32c.extend(crc, chunk)
        found = base64.b64encode(crc.to_bytes(4)).decode()
        return None if found == match[1] else (f"its CRC32C is {found}", match[1])

    def _has_tag_of_parts(self, file: File, output: IO[bytes], got: str) -> bool:
        """False: the file should be fetched again. Another ETag does not prove damage, since parts may have any size;
        but damaged files hardly arrive the same twice."""
        if not is_of_parts(file.version) or has_tag(output, file.size, file.version) or self._has_own_key(file):
            return True
        before, self._unlike[file] = self._unlike.get(file), got
        return before == got

    def _has_own_key(self, file: File) -> bool:
        """Whether it is encrypted with the user's own key: then its ETag only looks like an MD5."""
        headers = self._headers(file.place)
        by_key = "x-amz-server-side-encryption-customer-algorithm" in headers
        return by_key or headers.get("x-amz-server-side-encryption", "AES256") != "AES256"

    def _md5_of(self, file: File, got: str) -> str:
        """The MD5 of a file as the store says it, in hex; empty if it does not. `got` is what has arrived."""
        if self.name == "azure":
            said = self._headers(file.place).get("Content-MD5", "")
            return base64.b64decode(said).hex()
        tag = file.version.strip('"').lower()
        if not _MD5.fullmatch(tag) or self._bucket.endswith("--x-s3"):  # of parts, or in a directory bucket
            return ""
        return "" if tag != got and self.name == "s3" and self._has_own_key(file) else tag

    def _headers(self, place: str) -> Message:
        """The headers of an object, which obstore does not pass on. Empty if they cannot be asked for, as with
        credentials that sign no addresses."""
        try:
            address = obstore.sign(self._store, "HEAD", place, SIGNED_FOR)
            with urlopen(Request(address, method="HEAD"), timeout=self._timeout_s, context=self._trusted) as answer:
                headers: Message = answer.headers
                return headers
        except (BaseError, OSError, ValueError):
            return Message()

    @cached_property
    def _trusted(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if trusted := authorities():
            context.load_verify_locations(cadata=trusted.decode())
        return context

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
            if status_of(error) != 403:
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
                if status_of(error) not in (403, 404):
                    raise
                refused = error if status_of(error) == 403 else refused
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
        except OSError as error:
            raise AdapterSourceError(f"the files of {quote(id)} cannot be kept on disk: {error.strerror}") from error

    def _typed(self, error: Exception, id: str) -> AdapterError:
        title, code = self._kind.title, code_of(error)
        login = self._place.lacks_credentials(error) or _SENT.search(str(error))
        if isinstance(error, GenericError) and login:
            return AdapterSourceError(f"cannot ask {title} for {quote(id)}: this server has no credentials for it")
        match status_of(error):
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
                reason = trouble_of(error)
                kind = AdapterSourceError if "BareRedirect" in str(error) else SourceBusyError
                return kind(f"{title} did not hand over {quote(id)}: {reason}")
            case status if status in BUSY:
                return SourceBusyError(f"{title} answered {status}{code} for {quote(id)}")
            case status:
                return AdapterSourceError(f"{title} answered {status}{code} for {quote(id)}")


def _file(object: "ObjectMeta") -> File:
    etag = object["e_tag"] or ""
    return File(object["path"], etag if '"' in etag else f'"{etag}"', object["size"])  # Azure lists tags without quotes
