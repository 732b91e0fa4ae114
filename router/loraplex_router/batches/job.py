"""One batch that is being run: what is written down of it, so that no line is answered twice."""

import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from typing import Protocol

from loraplex_protos.errors import BatchNotFoundError
from loraplex_router.batches.reading import Line, check_lines, read_line, unhurried
from loraplex_router.batches.records import BatchRecord, Counts, ExpiresAfter, FileRecord, LineError, LineErrors, Status
from loraplex_router.batches.tally import Row, Tally
from loraplex_router.text.json_lines import dump_line

ENDED_AT = {
    Status.COMPLETED: "completed_at",
    Status.CANCELLED: "cancelled_at",
    Status.EXPIRED: "expired_at",
    Status.FAILED: "failed_at",
}
EXPIRED = {
    "code": "batch_expired",
    "message": "This request could not be executed before the completion window expired.",
}
GONE = LineError(code="input_file_not_found", message="The input file does not exist any more.")


class TakenOverError(Exception):
    """Another router has written down how far the batch is, and runs it now."""


class Place(Protocol):
    """What every job asks of the place where files and batches are kept."""

    def now(self) -> int:
        """A time.time by the clock of the place."""

    def register_file(
        self, tenant: str, id: str, filename: str, purpose: str, size: int, expires_after: ExpiresAfter | None
    ) -> FileRecord:
        """Lists a file whose content is complete."""


class Job(ABC):
    """Blocks while it reads and writes: call it in a thread. Where a batch is kept decides how answers are written
    down."""

    def __init__(self, place: Place, tenant: str, record: BatchRecord) -> None:
        self.tenant = tenant
        self.record = record
        self._place = place
        self._tally = Tally()
        self._writing = threading.Lock()
        self._open = False  # whether answers are taken

    def begin(self, longest: int) -> bool:
        """Checks the input, or finds what an earlier run has answered. Whether there is something to run. `longest`:
        bytes of a line."""
        record = self.record
        if record.in_progress_at is None:
            try:
                total, wrong = check_lines(unhurried(self._input()), record.endpoint, longest)
            except BatchNotFoundError:
                total, wrong = 0, [GONE]
            if wrong:
                record.errors = LineErrors(data=wrong)
                self.end(Status.FAILED)
                return False
            record.status, record.in_progress_at = Status.IN_PROGRESS, self._place.now()
            record.request_counts = Counts(total=total)
        self._resume()
        self._open = True
        self.save()
        return True

    def remaining(self) -> Iterator[Line]:
        """The lines that are not answered."""
        for text in unhurried(self._input()):
            line = read_line(text, self.record.endpoint)
            if isinstance(line, Line) and line.custom_id not in self._tally.done:
                yield line

    def add(self, line: Line, status_code: int, request_id: str, body: Row) -> None:
        """Takes an answer, unless the batch has ended. Raises OSError or UnavailableError if it cannot be written; the
        line is not answered then."""
        response = {"status_code": status_code, "request_id": request_id, "body": body}
        self._make_room()
        with self._writing:
            if self._open:
                self._answer(line, response, None)

    def save(self) -> None:
        """Writes down how far the batch is."""
        counts = self._tally.counts(self.record.request_counts.total)
        self.record.request_counts, self.record.usage = counts, self._tally.usage
        self._write_record()

    @property
    def unsaved(self) -> bool:
        """Whether there are answers that the record does not count."""
        return self._tally.counts(self.record.request_counts.total) != self.record.request_counts

    def finish(self, status: Status) -> None:
        """Ends the batch, and lists its files."""
        record = self.record
        with self._writing:
            self._open = False
        record.status, record.finalizing_at = Status.FINALIZING, self._place.now()
        if status is Status.EXPIRED:
            with suppress(BatchNotFoundError):
                for line in self.remaining():
                    self._make_room()
                    self._answer(line, None, EXPIRED)
        self.save()
        self._publish()
        self.end(status)

    def lose_input(self) -> Status:
        """Notes that the input does not exist any more. Returns how the batch has to end."""
        self.record.errors = LineErrors(data=[GONE])
        return Status.FAILED

    def end(self, status: Status) -> None:
        """Ends the batch without further files."""
        setattr(self.record, ENDED_AT[status], self._place.now())
        self.record.status = status
        self.save()

    def close(self) -> None:
        """No answer is taken from now on."""
        with self._writing:
            self._open = False

    def _answer(self, line: Line, response: Row | None, error: Row | None) -> None:
        id = f"batch_req_{secrets.token_hex(12)}"
        row: Row = {"id": id, "custom_id": line.custom_id, "response": response, "error": error}
        failed = response is None or response["status_code"] >= 400
        self._append(dump_line(row) + b"\n", failed)
        self._tally.add(row, failed)

    def _register(self, id: str, kind: str, size: int) -> None:
        """Lists a file of answers or errors."""
        name, expires_after = f"{self.record.id}_{kind}.jsonl", self.record.output_expires_after
        self._place.register_file(self.tenant, id, name, "batch_output", size, expires_after)

    def _make_room(self) -> None:  # noqa: B027
        """Called before an answer is taken."""

    @abstractmethod
    def _input(self) -> Iterator[bytes]:
        """The input's lines. Raises BatchNotFoundError."""

    @abstractmethod
    def _resume(self) -> None:
        """Tallies what earlier runs have answered, and makes ready to append."""

    @abstractmethod
    def _append(self, row: bytes, failed: bool) -> None: ...

    @abstractmethod
    def _write_record(self) -> None: ...

    @abstractmethod
    def _publish(self) -> None:
        """Lists the files of answers and of errors, and names them in the record; None for one without a line."""
