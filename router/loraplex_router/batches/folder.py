"""The folder in which files and batches are kept. Several routers may use the same one.

A tenant's files are TENANT/files/ID/content with TENANT/files/ID/record.json, its batches TENANT/batches/ID.json;
TENANT is a hash of its name. A record is replaced as a whole. A batch's record is written when it is created, and from
then on only by the router that holds the lock; TENANT/batches/ID.cancel asks that router to cancel it.
"""

import errno
import fcntl
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TypeVar

from pydantic import BaseModel, ValidationError

from loraplex_protos.errors import BatchNotFoundError, FieldViolation, InvalidRequestError, UnavailableError, quote
from loraplex_router.access.replaced_file import replace_file
from loraplex_router.batches.records import BatchRecord, FileRecord, Status, new_batch_id, new_file_id

FILE_SECONDS = 30 * 24 * 3600  # how long files and ended batches are kept, as OpenAI keeps them
WINDOW_SECONDS = 24 * 3600  # how long a batch may take
MOST_FILES = 1000  # of a tenant
MOST_BATCHES = 1000  # of a tenant, those that have ended included

FILE_ID = re.compile(r"file-[0-9a-f]{24}")
BATCH_ID = re.compile(r"batch_[0-9a-f]{24}")

R = TypeVar("R", bound=BaseModel)


class BatchFolder:
    """Blocks while it reads and writes: call it in a thread. Errors of the disk are UnavailableError."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        """`most_bytes`: of all files together. Raises OSError if the folder cannot be made."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"--batches: {path} cannot be made: {error.strerror}") from error
        self._path = path
        self._most_bytes = most_bytes
        self._lock: IO[bytes] | None = None
        self._naming = threading.Lock()
        self._ended = set[str]()  # batches' ids: their records do not change, so `unfinished` reads each once

    def lock(self) -> bool:
        """Whether this process runs the batches; if not, another router does. Held until the process ends."""
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

    def now(self) -> int:
        """A time.time by the clock that dates the folder's files: those of its routers may be wrong. Raises
        OSError."""
        with TemporaryFile(dir=self._path) as file:
            return int(os.fstat(file.fileno()).st_mtime)

    # ---- files -----------------------------------------------------------------------------------------------

    def add_file(self, tenant: str, filename: str, purpose: str, content: IO[bytes]) -> FileRecord:
        """Raises InvalidRequestError if there is no room for it."""
        size = content.seek(0, os.SEEK_END)
        content.seek(0)
        with _disk_errors():
            used = sum(entry.stat().st_size for entry in self._path.glob("*/files/*/content"))
        if used + size > self._most_bytes:
            limit = f"{self._most_bytes / 2**30:g} GiB"
            raise InvalidRequestError(FieldViolation("file", f"has no room: {limit} of files are kept, delete some"))
        if len(self.files(tenant)) >= MOST_FILES:
            raise InvalidRequestError(FieldViolation("file", f"is one too many: {MOST_FILES} are kept, delete some"))
        id = new_file_id()
        with _disk_errors():
            try:
                with self.open_file(tenant, id) as file:
                    shutil.copyfileobj(content, file, 1 << 20)
                    file.flush()
                    os.fsync(file.fileno())
                return self.register_file(tenant, id, filename, purpose)
            except OSError:
                shutil.rmtree(self._file(tenant, id), ignore_errors=True)
                raise

    def register_file(self, tenant: str, id: str, filename: str, purpose: str) -> FileRecord:
        """Lists a file whose content is complete."""
        now = self.now()
        record = FileRecord(
            id=id,
            bytes=self.content(tenant, id).stat().st_size,
            created_at=now,
            expires_at=now + FILE_SECONDS,
            filename=filename,
            purpose=purpose,
        )
        _write(self._file(tenant, id) / "record.json", record)
        return record

    def open_file(self, tenant: str, id: str) -> IO[bytes]:
        """Opens a file's content to append to it, new or not. A last line that was not written completely is cut
        off."""
        folder = self._file(tenant, id)
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "content").open("a+b")
        _cut_torn_line(file)
        return file

    def file(self, tenant: str, id: str) -> FileRecord:
        """Raises BatchNotFoundError."""
        found = _read(self._file(tenant, id) / "record.json", FileRecord) if FILE_ID.fullmatch(id) else None
        if found is None:
            raise BatchNotFoundError(f"there is no file {quote(id)}")
        return found

    def content(self, tenant: str, id: str) -> Path:
        return self._file(tenant, id) / "content"

    def files(self, tenant: str) -> list[FileRecord]:
        """Newest first."""
        found = [_read(path, FileRecord) for path in (self._tenant(tenant) / "files").glob("*/record.json")]
        return sorted((each for each in found if each), key=lambda each: (each.created_at, each.id), reverse=True)

    def delete_file(self, tenant: str, id: str) -> None:
        """Raises BatchNotFoundError, and InvalidRequestError if a batch that has not ended needs it."""
        self.file(tenant, id)
        if any(id == batch.input_file_id and not batch.status.final for batch in self.batches(tenant)):
            raise InvalidRequestError(FieldViolation("file_id", "is the input of a batch that has not ended"))
        with _disk_errors():
            shutil.rmtree(self._file(tenant, id))

    # ---- batches ---------------------------------------------------------------------------------------------

    def add_batch(
        self, tenant: str, input_file_id: str, endpoint: str, window: str, metadata: dict[str, str] | None
    ) -> BatchRecord:
        """Raises BatchNotFoundError for an unknown file, and InvalidRequestError for one that is not for batches."""
        if self.file(tenant, input_file_id).purpose != "batch":
            raise InvalidRequestError(FieldViolation("input_file_id", 'must be a file with the purpose "batch"'))
        if len(self.batches(tenant)) >= MOST_BATCHES:
            description = f"is one too many: {MOST_BATCHES} are kept for {FILE_SECONDS // 86400} days"
            raise InvalidRequestError(FieldViolation("batch", description))
        with _disk_errors():
            now = self.now()
        record = BatchRecord(
            id=new_batch_id(),
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=window,
            created_at=now,
            expires_at=now + WINDOW_SECONDS,
            metadata=metadata,
        )
        with _disk_errors():
            (self._tenant(tenant) / "batches").mkdir(parents=True, exist_ok=True)
            with self._naming:
                if not (name := self._tenant(tenant) / "name").exists():
                    replace_file(name, lambda file: file.write(tenant.encode()))
            self.write_batch(tenant, record)
        return record

    def write_batch(self, tenant: str, record: BatchRecord) -> None:
        _write(self._batch(tenant, record.id), record)

    def batch(self, tenant: str, id: str) -> BatchRecord:
        """Raises BatchNotFoundError."""
        found = _read(self._batch(tenant, id), BatchRecord) if BATCH_ID.fullmatch(id) else None
        if found is None:
            raise BatchNotFoundError(f"there is no batch {quote(id)}")
        return self._shown(tenant, found)

    def batches(self, tenant: str) -> list[BatchRecord]:
        """Newest first."""
        found = [_read(path, BatchRecord) for path in (self._tenant(tenant) / "batches").glob("*.json")]
        shown = [self._shown(tenant, each) for each in found if each]
        return sorted(shown, key=lambda each: (each.created_at, each.id), reverse=True)

    def unfinished(self) -> list[tuple[str, BatchRecord]]:
        """Every tenant's batches that have not ended, with the tenant's name, oldest first."""
        found = []
        for name in self._path.glob("*/name"):
            tenant = name.read_text()
            for path in (name.parent / "batches").glob("*.json"):
                record = None if path.stem in self._ended else _read(path, BatchRecord)
                if record is not None and record.status.final:
                    self._ended.add(path.stem)
                elif record is not None:
                    found.append((tenant, self._shown(tenant, record)))
        return sorted(found, key=lambda each: (each[1].created_at, each[1].id))

    def cancel(self, tenant: str, id: str) -> BatchRecord:
        """Asks for it; a batch that has ended stays as it is. Raises BatchNotFoundError."""
        record = self.batch(tenant, id)
        if record.status.final:
            return record
        with _disk_errors():
            self._batch(tenant, id).with_suffix(".cancel").touch()
        return self._shown(tenant, record)

    def cancelled(self, tenant: str, id: str) -> bool:
        """Whether it was asked for."""
        return self._batch(tenant, id).with_suffix(".cancel").exists()

    def delete_expired(self) -> None:
        """Deletes files, and batches that have ended, when their time is over."""
        now = self.now()
        for name in self._path.glob("*/name"):
            tenant = name.read_text()
            for batch in self.batches(tenant):
                if batch.status.final and batch.created_at + FILE_SECONDS < now:
                    self._ended.discard(batch.id)
                    self._batch(tenant, batch.id).unlink(missing_ok=True)
                    self._batch(tenant, batch.id).with_suffix(".cancel").unlink(missing_ok=True)
        for path in self._path.glob("*/files/*/record.json"):
            record = _read(path, FileRecord)
            if record is not None and record.expires_at < now:
                shutil.rmtree(path.parent, ignore_errors=True)

    def _shown(self, tenant: str, record: BatchRecord) -> BatchRecord:
        if not record.status.final and self.cancelled(tenant, record.id):
            asked = int(self._batch(tenant, record.id).with_suffix(".cancel").stat().st_mtime)
            return record.model_copy(update={"status": Status.CANCELLING, "cancelling_at": asked})
        return record

    def _tenant(self, name: str) -> Path:
        return self._path / sha256(name.encode()).hexdigest()[:32]

    def _file(self, tenant: str, id: str) -> Path:
        return self._tenant(tenant) / "files" / id

    def _batch(self, tenant: str, id: str) -> Path:
        return self._tenant(tenant) / "batches" / f"{id}.json"


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
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


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


def lines(path: Path) -> Iterator[bytes]:
    """The file's lines, empty ones included."""
    with path.open("rb") as file:
        yield from file
