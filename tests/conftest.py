"""Sets up an environment for clients that pin old dependencies, Triton's interpreter, and the marks of slow tests."""

import atexit
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

from tests.tools import describe_skipped

# Must be set before anything imports Triton or torch: the tests are the same on every machine. No GPU is used, and
# Triton's kernels are interpreted, unless `bench.gpu` asks for a GPU.
if os.environ.get("LORAPLEX_TEST_DEVICE") != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"

# As in ranks, whose processes that read adapters are forks: gRPC would start its threads again there, so that one which
# hangs would look busy.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# There is no time limit per example, because a machine that stalls would exceed it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Folders whose tests start processes, or render the chart hundreds of times; `make test-fast` leaves them out. Other
# slow files mark themselves.
SLOW_FOLDERS = ("bench", "chaos", "charts", "contract", "e2e", "examples", "fuzz", "operate")

OLD_CLIENTS = ("lorax-client==0.6.3", "text-generation==0.7.0")


EXIT_STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[EXIT_STATUS] = int(exitstatus)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the process here, as `loraplex shard` does. Threads of the kernels and of gRPC may still run while Python
    finalizes, and a crash after the last test would count as a failure."""
    status = config.stash.get(EXIT_STATUS, None)
    if status is not None:
        atexit._run_exitfuncs()  # such as pytest's removal of old temporary folders
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@pytest.fixture(scope="session")
def old_python(pytestconfig: pytest.Config) -> Path:
    """A Python with the old clients, which is kept between runs. Both processes that run tests use it."""
    folder = pytestconfig.cache.mkdir("old-clients")
    python = folder / "bin" / "python"
    complete = folder / "complete"
    with FileLock(folder / "lock"):
        if not complete.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", *OLD_CLIENTS], check=True)
            complete.touch()
    return python


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if skipped := describe_skipped(terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(skipped, yellow=True, bold=True)
