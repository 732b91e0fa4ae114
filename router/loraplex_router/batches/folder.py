"""The folder in which files and batches are kept. Several routers may use the same one.

A tenant's files are TENANT/files/ID/content with TENANT/files/ID/record.json, its batches TENANT/batches/ID.json;
TENANT is a hash of its name. A record is replaced as a whole. A batch's record is written when it is created, and from
then on only by the router that holds the lock; TENANT/batches/ID.cancel asks that router to cancel it.
"""

import errno
import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TypeVar

from pydantic import BaseModel

from loraplex_protos.errors import UnavailableError
from loraplex_router.access.replaced_file import replace_file
from loraplex_router.batches.batches import WINDOW_SECONDS, Batches, shown, tenant_folder
from loraplex_router.batches.folder_job import FolderJob
from loraplex_router.batches.known import KnownRecords, parsed
from loraplex_router.batches.records import FILE_SECONDS, BatchRecord, FileRecord, newest_first

# After which a file without a record was left by a router that died. A batch's answers get theirs when it ends.
ABANDONED_SECONDS = 2 * WINDOW_SECONDS

R = TypeVar("R", FileRecord, BatchRecord)


class BatchFolder(Batches):
    look_seconds = 1.0
    clean_seconds = 600.0

    def __init__(self, path: Path, most_bytes: int) -> None:
        """Raises OSError if the folder cannot be made."""
        super().__init__(most_bytes)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"--batches: {path} cannot be made: {error.strerror}") from error
        self._path = path
        self._lock: IO[bytes] | None = None
        self._known = KnownRecords()
        self._ended = set[str]()  # batches' ids: their records do not change, so `unfinished` reads each once

    def files(self, tenant: str) -> list[FileRecord]:
        return newest_first(self._records((self._tenant(tenant) / "files").glob("*/record.json"), FileRecord))

    def batches(self, tenant: str) -> list[BatchRecord]:
        found = self._records((self._tenant(tenant) / "batches").glob("*.json"), BatchRecord)
        asked = {path.stem for path in (self._tenant(tenant) / "batches").glob("*.cancel")}
        return newest_first(self._shown(tenant, each) if each.id in asked else each for each in found)

    def content(self, tenant: str, id: str) -> Path:
        return self._file(tenant, id) / "content"

    def lock(self) -> bool:
        """Held until the process ends."""
        if self._lock is None:
            file = (self._path / "lock").open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                return False
            self._lock = file
        return True

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def locked(self) -> bool:
        return self._lock is not None

    def now(self) -> int:
        """By the clock that dates the folder's files."""
        with _disk_errors(), TemporaryFile(dir=self._path) as file:
            return int(os.fstat(file.fileno()).st_mtime)

    def unfinished(self) -> list[tuple[str, str]]:
        found = []
        for name in self._path.glob("*/name"):
            tenant = name.read_text()
            for path in (name.parent / "batches").glob("*.json"):
                record = None if path.stem in self._ended else _read(path, BatchRecord)
                if record is not None and record.status.final:
                    self._ended.add(path.stem)
                elif record is not None:
                    found.append((tenant, record))
        found.sort(key=lambda each: (each[1].created_at, each[1].id))
        return [(tenant, record.id) for tenant, record in found]

    def job(self, tenant: str, id: str) -> FolderJob | None:
        record = self._find_batch(tenant, id)
        return None if record is None or record.status.final else FolderJob(self, tenant, record)

    def cancelled(self, tenant: str, id: str) -> bool:
        return self._batch(tenant, id).with_suffix(".cancel").exists()

    def delete_expired(self) -> None:
        now, needed = self.now(), set[str]()
        for name in self._path.glob("*/name"):
            tenant = name.read_text()
            for batch in self.batches(tenant):
                if not batch.status.final:
                    needed.add(batch.input_file_id)
                elif batch.created_at + FILE_SECONDS < now:
                    self._ended.discard(batch.id)
                    self._batch(tenant, batch.id).unlink(missing_ok=True)
                    self._batch(tenant, batch.id).with_suffix(".cancel").unlink(missing_ok=True)
        for folder in self._path.glob("*/files/*"):
            record = _read(folder / "record.json", FileRecord)
            with suppress(OSError):  # another router deletes it
                if record is not None:
                    over = record.expires_at < now and record.id not in needed
                else:  # a record that cannot be read is one
                    abandoned = not (folder / "record.json").exists()
                    over = abandoned and _last_change(folder) + ABANDONED_SECONDS < now
                if over:
                    shutil.rmtree(folder, ignore_errors=True)

    def open_file(self, tenant: str, id: str) -> IO[bytes]:
        """Opens a file's content to append to it, new or not. A last line that was not written completely is cut
        off."""
        folder = self._file(tenant, id)
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "content").open("a+b")
        _cut_torn_line(file)
        return file

    def write_batch(self, tenant: str, record: BatchRecord) -> None:
        _write(self._batch(tenant, record.id), record)

    def _used_bytes(self) -> Counter[str]:
        used = Counter[str]()
        with _disk_errors():
            for content in self._path.glob("*/files/*/content"):
                with suppress(FileNotFoundError):  # it has been deleted meanwhile
                    used[content.parts[-4]] += content.stat().st_size
        return used

    def _count_files(self, tenant: str) -> int:
        return sum(1 for _ in (self._tenant(tenant) / "files").glob("*/record.json"))

    def _count_batches(self, tenant: str) -> int:
        return sum(1 for _ in (self._tenant(tenant) / "batches").glob("*.json"))

    def _write_content(self, tenant: str, id: str, content: IO[bytes]) -> None:
        with _disk_errors(), self.open_file(tenant, id) as file:
            shutil.copyfileobj(content, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())

    def _write_file(self, tenant: str, record: FileRecord) -> None:
        with _disk_errors():
            _write(self._file(tenant, record.id) / "record.json", record)

    def _find_file(self, tenant: str, id: str) -> FileRecord | None:
        return _read(self._file(tenant, id) / "record.json", FileRecord)

    def _remove_file(self, tenant: str, id: str) -> None:
        with _disk_errors():
            shutil.rmtree(self._file(tenant, id))

    def _create_batch(self, tenant: str, record: BatchRecord) -> None:
        with _disk_errors():
            (self._tenant(tenant) / "batches").mkdir(parents=True, exist_ok=True)
            with _locked(self._tenant(tenant) / ".lock"):
                if not (name := self._tenant(tenant) / "name").exists():
                    replace_file(name, lambda file: file.write(tenant.encode()))
            self.write_batch(tenant, record)

    def _find_batch(self, tenant: str, id: str) -> BatchRecord | None:
        found = _read(self._batch(tenant, id), BatchRecord)
        return found and self._shown(tenant, found)

    def _ask_to_cancel(self, tenant: str, id: str) -> None:
        with _disk_errors():
            self._batch(tenant, id).with_suffix(".cancel").touch()

    def _shown(self, tenant: str, record: BatchRecord) -> BatchRecord:
        asked = self._batch(tenant, record.id).with_suffix(".cancel")
        return shown(record, int(asked.stat().st_mtime) if asked.exists() else None)

    def _records(self, paths: Iterator[Path], kind: type[R]) -> list[R]:
        versions = {str(path): version for path in paths if (version := _version(path))}
        return self._known.read(kind, versions, _read_all)

    def _tenant(self, name: str) -> Path:
        return self._path / tenant_folder(name)

    def _file(self, tenant: str, id: str) -> Path:
        return self._tenant(tenant) / "files" / id

    def _batch(self, tenant: str, id: str) -> Path:
        return self._tenant(tenant) / "batches" / f"{id}.json"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A context in which nobody else is that locks this path."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _disk_errors() -> Iterator[None]:
    """A context whose errors of the disk are UnavailableError."""
    try:
        yield
    except OSError as error:
        why = "its disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "its disk fails"
        raise UnavailableError(f"the folder of batches cannot be written: {why}") from error


def _write(path: Path, record: BaseModel) -> None:
    """Replaces the record as a whole, durably."""
    replace_file(path, lambda file: file.write(record.model_dump_json().encode()))


def _read(path: Path, kind: type[R]) -> R | None:
    """None: there is none, or not any more."""
    try:
        return parsed(path.read_bytes(), kind)
    except OSError:
        return None


def _read_all(paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Those that are still there."""
    for path in paths:
        with suppress(OSError):
            yield path, Path(path).read_bytes()


def _last_change(folder: Path) -> float:
    """When it, or what is in it, was changed, by the clock of its disk."""
    return max((path.stat().st_mtime for path in (folder, *folder.iterdir())), default=0.0)


def _version(path: Path) -> str | None:
    """Another one for each record that replaces it. None: it is not there any more."""
    try:
        status = path.stat()
    except OSError:
        return None
    return f"{status.st_ino} {status.st_mtime_ns}"


def _cut_torn_line(file: IO[bytes]) -> None:
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - 65536)
        file.seek(begin)
        at = file.read(end - begin).rfind(b"\n")
        if at >= 0:
            end = begin + at + 1
            break
        end = begin
    file.truncate(end)
