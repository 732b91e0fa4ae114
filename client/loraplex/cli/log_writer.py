"""Writes log lines on a thread of its own: whoever logs, such as an event loop or a step, never waits for a pager, a
full pipe or a disk that stalls."""

import logging
import os
import select
from threading import Condition, Thread

MOST_UNWRITTEN = 4 << 20  # bytes of lines that wait; further ones are dropped and counted
END_SECONDS = 2.0  # how long the end of the process waits for them


class LogWriter(logging.Handler):
    """A handler whose lines go to the open file with this number. In a fork of the process, which has no such thread,
    whoever logs writes."""

    def __init__(self, file: int) -> None:
        super().__init__()
        self._file = file
        self._process = os.getpid()
        self._changed = Condition()
        self._unwritten = bytearray()  # whole lines
        self._dropped = 0
        self._writing = False
        Thread(target=self._run, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        except Exception:
            self.handleError(record)
            return
        if os.getpid() != self._process:
            self._write(line)
            return
        with self._changed:
            if self._unwritten and len(self._unwritten) + len(line) > MOST_UNWRITTEN:
                self._dropped += 1
            else:
                self._unwritten += line
                self._changed.notify_all()

    def flush(self) -> None:
        """Waits until all lines are written, for END_SECONDS at most. logging.shutdown calls this, and so does Python
        at its end."""
        if os.getpid() == self._process:
            with self._changed:
                self._changed.wait_for(lambda: not self._unwritten and not self._writing, END_SECONDS)

    def _run(self) -> None:
        lost = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unwritten)
                lines, self._unwritten, self._writing = bytes(self._unwritten), bytearray(), True
                lost, self._dropped = lost + self._dropped, 0
            said = self._say_lost(lost) if lost else b""
            lost = 0 if self._write(lines + said) else lost + lines.count(b"\n")
            with self._changed:
                self._writing = False
                self._changed.notify_all()

    def _write(self, lines: bytes) -> bool:
        """Whether they could be written."""
        try:
            while lines:
                try:
                    lines = lines[os.write(self._file, lines) :]
                except BlockingIOError:  # somebody has made it non-blocking
                    select.select((), (self._file,), ())
        except OSError:  # its reader is gone, or the disk is full
            return False
        return True

    def _say_lost(self, lines: int) -> bytes:
        text = "%d log lines are lost: they could not be written in time"
        record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (lines,), None)
        self.filter(record)
        return f"{self.format(record)}\n".encode()
