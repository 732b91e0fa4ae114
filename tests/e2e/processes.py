"""Starts real processes: `loraplex serve`, or a router and shards."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any, Self

import psutil

START_SECONDS = 120  # a busy machine is slow


class Process:
    """A running `loraplex` command and its log."""

    module = "loraplex.cli.main"

    def __init__(self, *arguments: str, env: dict[str, str] | None = None, cwd: str | None = None) -> None:
        command = [sys.executable, "-m", self.module, *arguments]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("LORAPLEX_", "GRPC_"))}
        environment = {**clean, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "0", **(env or {})}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd)
        self.log = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def terminate(self) -> int:
        """Sends SIGTERM, and returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self._end()

    def terminate_with_all_it_started(self) -> None:
        """Sends SIGTERM to all of its processes, its own last, as systemd does for a service."""
        this = psutil.Process(self.process.pid)
        for process in [*reversed(this.children(recursive=True)), this]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.terminate()
        self._end()

    def _end(self) -> int:
        status = self.process.wait(60)
        self._reader.join(10)
        if self.process.stderr:
            self.process.stderr.close()
        return status

    def _read(self) -> None:
        assert self.process.stderr is not None
        with contextlib.suppress(ValueError):  # it is closed, although a child of the process still has it
            for line in self.process.stderr:
                self.log += line

    def _find(self, pattern: str) -> str:
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(pattern, self.log)):
            assert self.process.poll() is None and time.monotonic() < deadline, f"no server:\n{self.log}"
            time.sleep(0.05)
        return found.group(1)


class Edge(Process):
    """A command with ports. It is ready once it has printed its addresses, which the two patterns find."""

    def __init__(self, *arguments: str, address: str, url: str, **options: Any) -> None:
        command, *flags = arguments
        super().__init__(command, "--http-port=0", "--grpc-port=0", *flags, **options)  # a later flag overrides these
        try:
            self.address = self._find(address)
            self.url = self._find(url)
        except BaseException:
            self.kill()
            raise

    def health(self) -> int:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=60) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    def metrics(self) -> str:
        """All of them, as text."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            text: str = response.read().decode()
            return text

    def metric(self, name: str) -> float:
        """The sum of a metric's samples, all or with certain labels: `loraplex_kv_blocks{state="used"}` for example."""
        text = self.metrics()
        sample, _, label = name.rstrip("}").partition("{")
        found = re.findall(rf"^{sample}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        labelled = re.findall(rf"^{sample}{{.*\b{re.escape(label)}.*}} (\S+)$", text, re.MULTILINE)
        return sum(map(float, labelled if label else found))

    def wait_until(self, name: str, value: float, seconds: float = 20) -> None:
        """Waits for a metric to have a value."""
        deadline = time.monotonic() + seconds
        while (now := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {now}, not {value}"
            time.sleep(0.02)

    def assert_nothing_is_held(self) -> None:
        """Asserts that no sequence runs or waits, and no block is in use."""
        for name in ('loraplex_sequences{state="running"}', 'loraplex_sequences{state="waiting"}'):
            self.wait_until(name, 0)
        self.wait_until('loraplex_kv_blocks{state="used"}', 0)


class Server(Edge):
    """`loraplex serve`: router and shards, with the model loaded."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None, cwd: str | None = None) -> None:
        super().__init__("serve", *flags, address=r"gRPC  (\S+)", url=r"HTTP  (\S+)", env=env, cwd=cwd)


class Router(Edge):
    """`loraplex router`, which listens before any shards run."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None) -> None:
        patterns = {"address": r"port (\d+) \(gRPC\)", "url": r"port (\d+) \(HTTP\)"}
        super().__init__("router", *flags, **patterns, env=env)
        self.address, self.url = f"127.0.0.1:{self.address}", f"http://127.0.0.1:{self.url}"


class Shard(Process):
    """`loraplex shard`, which may still be loading."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None) -> None:
        super().__init__("shard", *flags, env=env)


class MortalShard(Shard):
    """A shard that some tokens kill, and that restarts then."""

    module = "tests.e2e.mortal_shard"


class ForkingShard(Shard):
    """A shard that gets SIGTERM while it forks."""

    module = "tests.e2e.forking_shard"


def free_port() -> int:
    """A free port, for a process that needs a fixed one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a `loraplex` command until it ends."""
    command = [sys.executable, "-m", "loraplex.cli.main", *arguments]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
