"""A batch that is being run in a folder: each answer is on the disk, as a line of a file, before it counts."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

import orjson

from loraplex_protos.errors import BatchNotFoundError
from loraplex_router.batches.job import Job, Place
from loraplex_router.batches.reading import unhurried
from loraplex_router.batches.records import BatchRecord, new_file_id


class Folder(Place, Protocol):
    def content(self, tenant: str, id: str) -> Path:
        """Where a file's content is, if it is there."""

    def open_file(self, tenant: str, id: str) -> IO[bytes]:
        """Opens a file's content, new or not, to append to it."""

    def write_batch(self, tenant: str, record: BatchRecord) -> None:
        """Replaces a batch's record."""


class FolderJob(Job):
    def __init__(self, folder: Folder, tenant: str, record: BatchRecord) -> None:
        super().__init__(folder, tenant, record)
        self._folder = folder
        self._files: tuple[IO[bytes], ...] = ()  # output and errors

    def close(self) -> None:
        super().close()
        for file in self._files:
            file.close()

    def _input(self) -> Iterator[bytes]:
        try:
            with self._folder.content(self.tenant, self.record.input_file_id).open("rb") as file:
                yield from file
        except FileNotFoundError:
            raise BatchNotFoundError("there is no input file") from None

    def _resume(self) -> None:
        record = self.record
        if record.output_file_id is None or record.error_file_id is None:
            record.output_file_id, record.error_file_id = new_file_id(), new_file_id()
            self._write_record()
        ids = record.output_file_id, record.error_file_id
        self._files = tuple(self._folder.open_file(self.tenant, id) for id in ids)
        for file, failed in zip(self._files, (False, True), strict=True):
            file.seek(0)
            for line in unhurried(file):
                self._tally.add(orjson.loads(line), failed)

    def _append(self, row: bytes, failed: bool) -> None:
        file = self._files[failed]
        end = file.seek(0, os.SEEK_END)
        try:
            while row:  # without the file's buffer, which would keep what a full disk did not take
                row = row[os.write(file.fileno(), row) :]
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise

    def _write_record(self) -> None:
        self._folder.write_batch(self.tenant, self.record)

    def _publish(self) -> None:
        self.close()
        self.record.output_file_id = self._listed(self.record.output_file_id, "output")
        self.record.error_file_id = self._listed(self.record.error_file_id, "error")

    def _listed(self, id: str | None, kind: str) -> str | None:
        """None for a file without a line, which is deleted."""
        assert id is not None
        path = self._folder.content(self.tenant, id)
        if not path.exists() or not (size := path.stat().st_size):
            path.unlink(missing_ok=True)
            return None
        self._register(id, kind, size)
        return id
