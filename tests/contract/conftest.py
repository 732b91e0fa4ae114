"""A real server of the tiny model, and the unmodified clients: those with old dependencies in an environment of their
own."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import Server
from tests.e2e.tiny import save_adapter, save_model

OLD_CLIENTS = ("lorax-client==0.6.3", "text-generation==0.7.0")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    adapters = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("first", "second")):
        save_adapter(model, adapters / name, 8, seed=seed)
    with Server(str(model), f"--adapters={adapters}", "--kv-blocks=256", "--threads=1") as running:
        yield running
        running.assert_nothing_is_held()


@pytest.fixture(scope="session")
def old_python(pytestconfig: pytest.Config) -> Path:
    """A Python with the old clients; kept between runs."""
    folder = pytestconfig.cache.mkdir("old-clients")
    python = folder / "bin" / "python"
    if (
        subprocess.run([python, "-c", "import lorax, text_generation"], check=False).returncode
        if python.exists()
        else 1
    ):
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *OLD_CLIENTS], check=True)
    return python


@pytest.fixture
def run_script(old_python: Path, server: Server) -> Callable[[str], None]:
    """Runs a Python script with the old clients; it is given the server's URL, and fails by raising."""

    def run(script: str) -> None:
        command = [str(old_python), "-c", script, server.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr

    return run
