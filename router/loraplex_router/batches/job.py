"""One batch that is being run: what is written down of it, so that no line is answered twice."""

import os
import secrets
import threading
from collections.abc import Iterator
from typing import IO, Any

import orjson

from loraplex_router.batches.folder import BatchFolder, lines
from loraplex_router.batches.reading import Line, check_lines, read_line
from loraplex_router.batches.records import BatchRecord, Counts, LineErrors, Status, Usage, new_file_id
from loraplex_router.text.json_lines import dump_line

Body = dict[str, Any]

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


class Job:
    """Blocks while it reads and writes: call it in a thread. An answer is durable when `add` has returned."""

    def __init__(self, folder: BatchFolder, tenant: str, record: BatchRecord) -> None:
        self.tenant = tenant
        self.record = record
        self._folder = folder
        self._done = set[str]()
        self._writing = threading.Lock()
        self._files: tuple[IO[bytes], ...] = ()  # output and errors

    def begin(self, longest: int) -> bool:
        """Checks the input, or finds what an earlier run has answered. Whether there is something to run. `longest`:
        bytes of a line."""
        record = self.record
        if record.in_progress_at is None:
            total, wrong = check_lines(self._input(), record.endpoint, longest)
            if wrong:
                record.errors = LineErrors(data=wrong)
                self._end(Status.FAILED)
                return False
            record.status, record.in_progress_at = Status.IN_PROGRESS, self._folder.now()
            record.request_counts = Counts(total=total)
            record.output_file_id, record.error_file_id = new_file_id(), new_file_id()
            self.save()
        assert record.output_file_id and record.error_file_id
        ids = record.output_file_id, record.error_file_id
        self._files = tuple(self._folder.open_file(self.tenant, id) for id in ids)
        counts, record.usage = Counts(total=record.request_counts.total), Usage()
        for line in lines(self._folder.content(self.tenant, record.output_file_id)):
            self._count(orjson.loads(line))
            counts.completed += 1
        for line in lines(self._folder.content(self.tenant, record.error_file_id)):
            self._count(orjson.loads(line))
            counts.failed += 1
        record.request_counts = counts
        return True

    def remaining(self) -> Iterator[Line]:
        """The lines that are not answered."""
        for text in self._input():
            line = read_line(text, self.record.endpoint)
            if isinstance(line, Line) and line.custom_id not in self._done:
                yield line

    def add(self, line: Line, status_code: int, request_id: str, body: Body) -> None:
        """Writes an answer down, unless the batch has ended. Raises OSError if the disk is full; the line is not
        answered then."""
        response = {"status_code": status_code, "request_id": request_id, "body": body}
        failed = status_code >= 400
        with self._writing:
            if not self._files:
                return
            self._append(self._files[failed], line, response, None)
            if failed:
                self.record.request_counts.failed += 1
            else:
                self.record.request_counts.completed += 1

    def save(self) -> None:
        self._folder.write_batch(self.tenant, self.record)

    def finish(self, status: Status) -> None:
        """Ends the batch, as completed, cancelled or expired, and lists its files."""
        record = self.record
        record.status, record.finalizing_at = Status.FINALIZING, self._folder.now()
        self.save()
        with self._writing:
            if status is Status.EXPIRED:
                for line in self.remaining():
                    self._append(self._files[True], line, None, EXPIRED)
                    record.request_counts.failed += 1
        self.close()
        record.output_file_id = self._listed(record.output_file_id, "output")
        record.error_file_id = self._listed(record.error_file_id, "error")
        self._end(status)

    def close(self) -> None:
        """Nothing is written down from now on."""
        with self._writing:
            for file in self._files:
                file.close()
            self._files = ()

    def _append(self, file: IO[bytes], line: Line, response: Body | None, error: Body | None) -> None:
        id = f"batch_req_{secrets.token_hex(12)}"
        row = {"id": id, "custom_id": line.custom_id, "response": response, "error": error}
        data, end = dump_line(row) + b"\n", file.seek(0, os.SEEK_END)
        try:
            while data:  # without the file's buffer, which would keep what a full disk did not take
                data = data[os.write(file.fileno(), data) :]
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise
        self._count(row)

    def _count(self, row: Body) -> None:
        self._done.add(row["custom_id"])
        used = ((row["response"] or {}).get("body") or {}).get("usage") or {}
        usage = self.record.usage
        given = used.get("prompt_tokens", used.get("input_tokens", 0))
        made = used.get("completion_tokens", used.get("output_tokens", 0))
        cached = used.get("prompt_tokens_details") or used.get("input_tokens_details") or {}
        thought = used.get("completion_tokens_details") or used.get("output_tokens_details") or {}
        usage.input_tokens += given
        usage.output_tokens += made
        usage.total_tokens += given + made
        usage.input_tokens_details.cached_tokens += cached.get("cached_tokens") or 0
        usage.output_tokens_details.reasoning_tokens += thought.get("reasoning_tokens") or 0

    def _listed(self, id: str | None, kind: str) -> str | None:
        """None for a file without a line, which is deleted."""
        assert id is not None
        path = self._folder.content(self.tenant, id)
        if not path.exists() or not path.stat().st_size:
            path.unlink(missing_ok=True)
            return None
        self._folder.register_file(self.tenant, id, f"{self.record.id}_{kind}.jsonl", "batch_output")
        return id

    def _end(self, status: Status) -> None:
        setattr(self.record, ENDED_AT[status], self._folder.now())
        self.record.status = status
        self.save()

    def _input(self) -> Iterator[bytes]:
        return lines(self._folder.content(self.tenant, self.record.input_file_id))
