"""The folder beside the registry file in which uploaded adapters are kept. Routers may share it.

An upload is ID.tar, an archive of its files. It is complete before the registry file names it, and is deleted once no
version there is of it any more.
"""

import asyncio
import os
import re
import tarfile
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TypeVar

from loraplex_protos.errors import AdapterSourceError, OverloadedError
from loraplex_router.access.replaced_file import replace_file
from loraplex_router.vocabulary.references import Upload

FORGOTTEN_SECONDS = 3600.0  # after which an upload that no version ever named, since its router died, is deleted
PART = 1 << 24  # bytes read at a time
T = TypeVar("T")

_NAME = re.compile(r"[0-9a-f]{32}\.tar|\.[0-9a-f]{32}\.tar\.new")


class UploadFolder:
    """Blocks while it reads and writes: call it with `run`."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        """`most_bytes`: of all uploads together. The folder is made for the first one."""
        self.path = path
        self._most = most_bytes
        self._threads = ThreadPoolExecutor(4, "uploads")
        self._opened = weakref.WeakValueDictionary[str, Upload]()

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Calls a function on a thread that only uploads wait for: the folder's disk may hang."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments))

    def check_room(self, size: int) -> None:
        """Raises OverloadedError if there is no room for an upload."""
        free = self._most - sum(status.st_size for _, status in self._files())
        if size > free:
            why = f"the upload has {size} bytes, but only {free} of --adapter-uploads-mib are free: remove another one"
            raise OverloadedError(why)

    def add(self, upload: Upload) -> Upload:
        """Writes an upload down, which is read from the disk from then on. Raises OverloadedError if there is no room,
        OSError if it cannot be written."""
        self.path.mkdir(exist_ok=True)
        self.check_room(sum(map(len, upload.read().values())))
        replace_file(self._file(upload.id), partial(_write, upload.read()))
        return self.open(upload.id)

    def open(self, id: str) -> Upload:
        """An upload, which can then be read even after another router has deleted it. If there is none, its `read`
        raises AdapterSourceError."""
        known = self._opened.get(id)
        if known is not None:
            return known
        try:
            descriptor = os.open(self._file(id), os.O_RDONLY)
        except OSError as error:
            return Upload(partial(_refuse, f"its upload {id} cannot be read: {error.strerror}"), id)
        upload = self._opened[id] = Upload(partial(_read, descriptor, id), id)
        weakref.finalize(upload, os.close, descriptor)
        return upload

    def has(self, id: str) -> bool:
        return id in self._opened

    def keep_only(self, ids: Collection[str], former: Collection[str]) -> None:
        """Deletes the uploads that are not among `ids` any more, but were among `former` ones, and forgotten ones."""
        gone = [(path, status) for path, status in self._files() if path.stem not in ids]
        now = self._now() if gone else 0.0
        for path, status in gone:
            if path.stem in former or status.st_mtime + FORGOTTEN_SECONDS < now:
                with suppress(OSError):
                    path.unlink()

    def remove(self, id: str) -> None:
        with suppress(OSError):
            self._file(id).unlink()

    def _now(self) -> float:
        """By the clock that dates the files, which may be another machine's; 0 if it cannot be known."""
        try:
            with TemporaryFile(dir=self.path) as file:
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            return 0.0

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Uploads, and those that are being written."""
        for path in self.path.glob("*"):
            with suppress(FileNotFoundError):
                if _NAME.fullmatch(path.name):
                    yield path, path.stat()

    def _file(self, id: str) -> Path:
        return self.path / f"{id}.tar"


def _write(files: Mapping[str, memoryview], to: IO[bytes]) -> None:
    with tarfile.open(fileobj=to, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, BytesIO(data))


def _read(descriptor: int, id: str) -> Mapping[str, memoryview]:
    """Raises AdapterSourceError."""
    try:
        data = bytearray()
        while part := os.pread(descriptor, PART, len(data)):
            data += part
        with tarfile.open(fileobj=BytesIO(data)) as archive:
            found = {each.name: memoryview(data)[each.offset_data :][: each.size] for each in archive}
    except (OSError, tarfile.TarError) as error:
        raise AdapterSourceError(f"its upload {id} cannot be read: {error}") from error
    return found


def _refuse(why: str) -> Mapping[str, memoryview]:
    raise AdapterSourceError(why)
