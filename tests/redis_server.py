"""A real Redis server."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def redis_server(folder: Path, *flags: str) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Its URL and its process. It listens on a socket in the folder."""
    path, usual = folder / "redis", ("--port", "0", "--save", "", "--loglevel", "warning", "--dir", str(folder))
    with subprocess.Popen(["redis-server", "--unixsocket", str(path), *usual, *flags]) as process:
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        try:
            yield f"unix://{path}", process
        finally:
            process.kill()
