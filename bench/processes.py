"""Real loraplex processes on this machine, which are started for a measurement and stopped afterwards."""

import re
import subprocess
import sys
import tempfile
from typing import Self

from bench.load import LoadError

PATTERNS = {"grpc": r"gRPC\s+(\S+:\d+)", "http": r"HTTP\s+(?:http://)?(\S+:\d+)"}


class Loraplex:
    """`loraplex COMMAND` with these flags, on free ports, until the `with` block ends."""

    def __init__(self, command: str, *flags: str) -> None:
        self._command = command
        ports = "--http-port=0", "--grpc-port=0"
        self._arguments = [sys.executable, "-m", "loraplex.cli.main", command, *ports, *flags]

    @classmethod
    def bare(cls, seconds: float) -> Self:
        """Runs `bench.bare_servers` instead, which only send a message at a fixed interval."""
        bare = cls("bare")
        bare._arguments = [sys.executable, "-m", "bench.bare_servers", str(seconds)]
        return bare

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(self._arguments, stdout=self._log, stderr=self._log)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        self._log.close()

    def log(self) -> str:
        """What the process has printed."""
        self._log.seek(0)
        return self._log.read()

    def addresses(self) -> dict[str, str]:
        """HOST:PORT of "grpc" and "http"; empty until the process is ready. Raises LoadError with its log if it has
        ended."""
        log = self.log()
        if self.process.poll() is not None:
            raise LoadError(f"loraplex {self._command} ended: {log}")
        found = {kind: match[1] for kind, pattern in PATTERNS.items() if (match := re.search(pattern, log))}
        return found if len(found) == len(PATTERNS) else {}
