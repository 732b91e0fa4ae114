"""A batch that is being run in a bucket.

Answers are kept as parts, objects of many lines that are written every few seconds. A router that was taken for dead
may write late, so several may run the same batch for a moment. Nothing of that is seen:

* Its record is only replaced by the run that replaced it last (by the object's version).
* Each run has parts with names of its own. Which lines are answered follows from all parts; if a line is in two of
  them, the first one counts.
* Each run puts its parts together in files with names of its own, which its record names before they are there. If
  another run replaces the record, that one deletes them.
"""

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import orjson

from loraplex_protos.errors import UnavailableError
from loraplex_router.batches import layout
from loraplex_router.batches.job import Job, Place, TakenOverError
from loraplex_router.batches.objects import ConflictError, Objects
from loraplex_router.batches.reading import split_lines, unhurried
from loraplex_router.batches.records import BatchRecord, Status, new_file_id
from loraplex_router.batches.tally import Tally

if TYPE_CHECKING:
    from obstore import UpdateVersion

MOST_ROWS, MOST_BYTES = 500, 4 << 20  # of a part, and so of what has to be computed again after a crash
INPUT_PIECE = 256 << 10  # bytes of the input in memory: all batches read at the same time
TRIES, PAUSE = 3, 1.0  # of replacing a record; seconds: Google Cloud Storage takes one version a second
KINDS = "output", "error"


class Bucket(Place, Protocol):
    @property
    def objects(self) -> Objects: ...

    def read(self, tenant: str, id: str, **options: int) -> Iterator[bytes]:
        """The pieces of a file. Raises BatchNotFoundError."""

    def upload(self, tenant: str, id: str, content: Iterator[bytes]) -> None:
        """Writes a file's content."""

    def remove_files(self, tenant: str, ids: Sequence[str | None]) -> None:
        """Deletes those that there are."""

    def forget(self, id: str) -> None:
        """Deletes what is kept of a batch only until it has ended."""


class BucketJob(Job):
    def __init__(self, bucket: Bucket, tenant: str, record: BatchRecord, version: "UpdateVersion") -> None:
        super().__init__(bucket, tenant, record)
        self._bucket = bucket
        self._version = version
        self._run = secrets.token_hex(8)
        self._number = 0  # of the next part
        self._rows: tuple[list[bytes], list[bytes]] = [], []  # answers and errors that are not written yet
        self._flushing = threading.Lock()

    def save(self) -> None:
        self._flush()
        super().save()

    def end(self, status: Status) -> None:
        try:
            super().end(status)
        except TakenOverError:
            self._bucket.remove_files(self.tenant, [self.record.output_file_id, self.record.error_file_id])
            raise
        self._bucket.forget(self.record.id)

    def _input(self) -> Iterator[bytes]:
        return split_lines(self._bucket.read(self.tenant, self.record.input_file_id, piece=INPUT_PIECE))

    def _resume(self) -> None:
        for failed in False, True:
            for _ in self._answered(self._tally, failed):
                pass

    def _make_room(self) -> None:
        if self._is_full():
            if not self._flushing.acquire(blocking=False):  # if that hangs, nobody waits here with a thread
                raise UnavailableError("answers are being written down: try again")
            try:
                self._write_rows()
            finally:
                self._flushing.release()

    def _append(self, row: bytes, failed: bool) -> None:
        self._rows[failed].append(row)

    def _flush(self) -> None:
        with self._flushing:
            self._write_rows()

    def _write_rows(self) -> None:
        """Each try has a name of its own, since one that failed may still come."""
        for rows, kind in zip(self._rows, KINDS, strict=True):
            if count := len(rows):
                path = f"{layout.parts(self.record.id)}/{self._run}-{self._number:06}.{kind}"
                self._number += 1
                self._bucket.objects.put(path, b"".join(rows[:count]))
                del rows[:count]

    def _is_full(self) -> bool:
        return sum(map(len, self._rows)) >= MOST_ROWS or sum(map(len, chain(*self._rows))) >= MOST_BYTES

    def _write_record(self) -> None:
        for _ in range(TRIES - 1):
            with suppress(UnavailableError):
                return self._replace_record()
            time.sleep(PAUSE)
        self._replace_record()

    def _replace_record(self) -> None:
        path, replace = layout.batch(self.tenant, self.record.id), self._bucket.objects.replace
        content = orjson.dumps(self.record.model_dump() | {"run": self._run})
        try:
            self._version = replace(path, content, self._version)
        except ConflictError:
            found = self._bucket.objects.find(path)
            if found is None or orjson.loads(found.content).get("run") != self._run:
                raise TakenOverError from None
            # After a write of this run that was not answered.
            try:
                self._version = replace(path, content, found.version)
            except ConflictError:
                raise TakenOverError from None

    def _publish(self) -> None:
        record = self.record
        former = record.output_file_id, record.error_file_id  # of a run that did not end
        record.output_file_id, record.error_file_id = new_file_id(), new_file_id()
        self._write_record()
        self._bucket.remove_files(self.tenant, former)
        tally = Tally()
        record.output_file_id = self._listed(record.output_file_id, tally, False)
        record.error_file_id = self._listed(record.error_file_id, tally, True)
        self._tally = tally

    def _listed(self, id: str, tally: Tally, failed: bool) -> str | None:
        """None if there is no line."""
        size = 0

        def measured(pieces: Iterator[bytes]) -> Iterator[bytes]:
            nonlocal size
            for piece in pieces:
                size += len(piece)
                yield piece

        pieces = measured(self._answered(tally, failed))
        first = next(pieces, None)
        if first is None:
            return None
        self._bucket.upload(self.tenant, id, chain([first], pieces))
        self._register(id, KINDS[failed], size)
        return id

    def _answered(self, tally: Tally, failed: bool) -> Iterator[bytes]:
        """The lines of all parts of a kind that the tally does not have, which it gets."""
        listed = self._bucket.objects.list(layout.parts(self.record.id))
        paths = sorted(part.path for part in listed if part.path.endswith(KINDS[failed]))
        for _, content in self._bucket.objects.find_all(paths):
            kept = [line for line in unhurried(split_lines([content])) if tally.add(orjson.loads(line), failed)]
            if kept:
                yield b"".join(kept)
