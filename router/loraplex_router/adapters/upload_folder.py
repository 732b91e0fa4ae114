"""The folder beside the registry file in which uploaded adapters are kept. Routers may share it.

An upload is ID.tar, an archive of its files. It is complete before the registry file names it. Once no version there is
of it any more, it is called ID.left: another router may not know that yet, requests that began with it may have to move
to another replica, and the file may name it again. It is deleted later, or as soon as other uploads need its room.
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

LEFT_SECONDS = 600.0  # after which an upload that the registry no longer names is deleted
FORGOTTEN_SECONDS = 3600.0  # after which one is left that no version ever named, since its router died
KEPT, LEFT = ".tar", ".left"
T = TypeVar("T")

_NAME = re.compile(rf"[0-9a-f]{{32}}({KEPT}|{LEFT})|\.[0-9a-f]{{32}}{KEPT}\.new")


class UploadFolder:
    """Blocks while it reads and writes: call it with `run`."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        """`most_bytes`: of all uploads together. The folder is made for the first one."""
        self.path = path
        self._most = most_bytes
        self._threads = ThreadPoolExecutor(4, "uploads")
        self._found = weakref.WeakValueDictionary[str, Upload]()

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Calls a function on a thread that only uploads wait for: the folder's disk may hang."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments))

    def check_room(self, size: int) -> None:
        """Raises OverloadedError if there is no room for an upload."""
        free = self._most - sum(status.st_size for path, status in self._files() if path.suffix != LEFT)
        if size > free:
            why = f"the upload has {size} bytes, but only {free} of --adapter-uploads-mib are free: remove another one"
            raise OverloadedError(why)

    def add(self, upload: Upload) -> Upload:
        """Writes an upload down, which is read from the disk from then on. Raises OverloadedError if there is no room,
        OSError if it cannot be written."""
        files = upload.read()
        size = sum(map(len, files.values()))
        self.path.mkdir(exist_ok=True)
        self.check_room(size)
        self._delete_left(self._most - size)
        try:
            replace_file(self._file(upload.id), partial(_write, files))
        except OSError:  # the disk may be full
            self._delete_left(0)
            replace_file(self._file(upload.id), partial(_write, files))
        return self.find(upload.id)

    def find(self, id: str) -> Upload:
        """An upload. If there is none, its `read` raises AdapterSourceError."""
        upload = self._found.get(id)
        if upload is None:
            upload = Upload(partial(self._read, id), id)
            if any(os.path.exists(self._file(id, suffix)) for suffix in (KEPT, LEFT, KEPT)):  # it may be renamed
                self._found[id] = upload
        return upload

    def has(self, id: str) -> bool:
        """Whether `find` has found it."""
        return id in self._found

    def keep_only(self, ids: Collection[str], former: Collection[str]) -> bool:
        """Uploads that are not among `ids` any more, but were among `former` ones, are left, as are forgotten ones;
        those among `ids` are not. Deletes what was left long ago. Returns whether any are to be deleted later."""
        files = list(self._files())
        now, later = self._now() if any(path.stem not in ids for path, _ in files) else 0.0, False
        for path, status in files:
            age = now - status.st_mtime
            with suppress(OSError):
                if path.stem in ids:
                    if path.suffix == LEFT:
                        path.rename(path.with_suffix(KEPT))
                elif path.suffix == KEPT and (path.stem in former or age > FORGOTTEN_SECONDS):
                    later = True
                    with suppress(OSError):  # it may be another user's
                        os.utime(path)
                    path.rename(path.with_suffix(LEFT))
                elif age > (LEFT_SECONDS if path.suffix == LEFT else FORGOTTEN_SECONDS):
                    path.unlink()
                else:
                    later = True
        return later

    def remove(self, id: str) -> None:
        with suppress(OSError):
            self._file(id).unlink()

    def _read(self, id: str) -> Mapping[str, memoryview]:
        """Raises AdapterSourceError."""
        try:
            data = memoryview(self._read_file(id))
            with tarfile.open(fileobj=BytesIO(data)) as archive:
                return {each.name: data[each.offset_data :][: each.size] for each in archive}
        except (OSError, tarfile.TarError) as error:
            why = (isinstance(error, OSError) and error.strerror) or error  # without the path
            raise AdapterSourceError(f"its upload {id} cannot be read: {why}") from error

    def _read_file(self, id: str) -> bytes:
        for suffix in (KEPT, LEFT):
            with suppress(FileNotFoundError):
                return self._file(id, suffix).read_bytes()
        return self._file(id).read_bytes()  # it has been named again meanwhile, or there is none

    def _delete_left(self, most: int) -> None:
        """Deletes the oldest of those that are left, until all files together have at most so many bytes."""
        files = sorted(self._files(), key=lambda file: file[1].st_mtime)
        size = sum(status.st_size for _, status in files)
        for path, status in files:
            if path.suffix == LEFT and size > most:
                size -= status.st_size
                with suppress(OSError):
                    path.unlink()

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
            with suppress(OSError):
                if _NAME.fullmatch(path.name):
                    yield path, path.stat()

    def _file(self, id: str, suffix: str = KEPT) -> Path:
        return self.path / f"{id}{suffix}"


def _write(files: Mapping[str, memoryview], to: IO[bytes]) -> None:
    with tarfile.open(fileobj=to, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
