"""Objects below a prefix of a bucket, which several routers read and write."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO, TYPE_CHECKING, NamedTuple, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from loraplex_protos.errors import UnavailableError
from loraplex_protos.object_stores import Place, code_of, status_of, trouble_of

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutResult, UpdateVersion

TIMEOUT = 5.0  # seconds, of small objects
PIECE_TIMEOUT = 60.0  # of a piece of a large one
PIECE, MOST_PIECES = 8 << 20, 2  # bytes of a large object, and how many are in flight
TRIES, PAUSE = 4, 0.5  # of reading a piece; seconds, which double
PAGE = 1000
AT_ONCE = 8  # objects that are read


R = TypeVar("R")


class ConflictError(Exception):
    """The object is not what it was when it was read last."""


class Found(NamedTuple):
    content: bytes
    version: "UpdateVersion"


class Listed(NamedTuple):
    path: str
    size: int
    modified: int  # a time.time by the store's clock
    version: str


class Objects:
    """Blocks. A store that does not answer, or refuses, is UnavailableError, which names it. Whether a write has
    happened that raised it is not known: it may even come later."""

    def __init__(self, url: str) -> None:
        """Raises ValueError for settings in the environment that are wrong or insufficient."""
        self._place = Place.at(url)
        self._small, self._large = self._place.open(TIMEOUT), self._place.open(PIECE_TIMEOUT)

    def find(self, path: str) -> Found | None:
        try:
            with self._errors():
                found = obstore.get(self._small, self._full(path))
                return Found(bytes(found.bytes()), _version(found.meta))
        except FileNotFoundError:
            return None

    def find_all(self, paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Those of them that are there, in this order."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for begin in range(0, len(paths), AT_ONCE):
                group = paths[begin : begin + AT_ONCE]
                for path, found in zip(group, pool.map(self.find, group), strict=True):
                    if found is not None:
                        yield path, found.content

    def modified(self, path: str) -> int | None:
        """When it was written, as a time.time by the store's clock."""
        try:
            with self._errors():
                return int(obstore.head(self._small, self._full(path))["last_modified"].timestamp())
        except FileNotFoundError:
            return None

    def list(self, folder: str) -> Iterator[Listed]:
        """All objects below it, those of its folders as well; all there are for an empty name."""
        with self._errors(), self._bucket_is_there():
            for page in obstore.list(self._small, self._full(folder) or None, chunk_size=PAGE):
                for object in page:
                    path = object["path"].removeprefix(self._place.prefix)
                    modified = int(object["last_modified"].timestamp())
                    yield Listed(path, object["size"], modified, object["e_tag"] or "")

    def put(self, path: str, content: bytes) -> None:
        with self._errors(), self._bucket_is_there():
            obstore.put(self._small, self._full(path), content, use_multipart=False)

    def replace(self, path: str, content: bytes, version: "UpdateVersion | None") -> "UpdateVersion":
        """Writes it if it still has this version; None: if it is not there. Raises ConflictError."""
        try:
            with self._errors():
                return _version(obstore.put(self._small, self._full(path), content, mode=version or "create"))
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            raise ConflictError(path) from None

    def upload(self, path: str, content: IO[bytes] | Iterator[bytes]) -> None:
        """Writes a large object. It is there as a whole or not at all."""
        with self._errors(), self._bucket_is_there():
            obstore.put(self._large, self._full(path), content, chunk_size=PIECE, max_concurrency=MOST_PIECES)

    def read(self, path: str, piece: int = PIECE) -> Iterator[bytes]:
        """An object that never changes, in pieces of this many bytes. Raises FileNotFoundError."""
        full = self._full(path)
        size = self._try(partial(obstore.head, self._small, full))["size"]
        for begin in range(0, size, piece):
            end = min(begin + piece, size)
            yield bytes(self._try(partial(obstore.get_range, self._large, full, start=begin, end=end)))

    def delete(self, paths: Sequence[str]) -> None:
        """Those of them that are there."""
        full = [self._full(path) for path in paths]
        try:
            with self._errors():
                obstore.delete(self._small, full)
        except FileNotFoundError:  # of one of them: others may be left
            for path in full:
                with suppress(FileNotFoundError), self._errors():
                    obstore.delete(self._small, path)

    def _try(self, ask: Callable[[], R]) -> R:
        """Tries it several times."""
        pause = PAUSE
        for _ in range(TRIES - 1):
            with suppress(UnavailableError), self._errors():
                return ask()
            time.sleep(pause)
            pause *= 2
        with self._errors():
            return ask()

    def _full(self, path: str) -> str:
        return self._place.prefix + path

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (AlreadyExistsError, PreconditionError):
            raise
        except (BaseError, ValueError) as error:
            raise UnavailableError(f"the bucket of batches in {self._place.kind.title} {self._why(error)}") from None

    @contextmanager
    def _bucket_is_there(self) -> Iterator[None]:
        """For calls that need no object."""
        try:
            yield
        except FileNotFoundError as error:
            raise UnavailableError(f"the bucket of batches in {self._place.kind.title} {self._why(error)}") from None

    def _why(self, error: Exception) -> str:
        if self._place.lacks_credentials(error):
            return "cannot be used: this server has no credentials for it"
        if (status := status_of(error)) == 404:
            return "does not exist"
        if status:
            return f"cannot be used: it answers {status}{code_of(error)}"
        return f"cannot be used: {trouble_of(error)}"


def _version(meta: "ObjectMeta | PutResult") -> "UpdateVersion":
    """Amazon and Azure compare the ETag, Google the version."""
    version: UpdateVersion = {}
    if meta["e_tag"]:
        version["e_tag"] = meta["e_tag"]
    if meta["version"]:
        version["version"] = meta["version"]
    return version
