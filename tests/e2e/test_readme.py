"""The README's commands, unchanged, against the server that `make serve` starts."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import Server

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found
    return found


@pytest.fixture(scope="module")
def served() -> Iterator[Server]:
    """The server that `make serve` runs, on its default ports and with its adapters."""
    make = ["make", "--dry-run", "--always-make", "--no-print-directory", "serve"]
    callers = {"ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}  # from the make that runs the tests
    environment = {name: value for name, value in os.environ.items() if name not in callers}
    recipe = subprocess.run(make, cwd=ROOT, env=environment, capture_output=True, text=True)
    command, *flags = shlex.split(recipe.stdout.strip().splitlines()[-1])
    assert command.endswith("/loraplex") and flags[0] == "serve"
    with Server(*flags[1:], "--http-port=3000", "--grpc-port=50051", "--kv-blocks=512", cwd=str(ROOT)) as running:
        yield running


@pytest.mark.parametrize("script", blocks("sh"))
def test_a_shell_command_works_as_written(served: Server, script: str):
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    script = script.replace(".venv/bin/", f"{bin_folder}/")
    result = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout or "health" in script


@pytest.mark.parametrize("script", blocks("python"))
def test_a_python_example_works_as_written(served: Server, script: str):
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout and "Angela Jones" in result.stdout


def test_every_setting_that_the_readme_names_exists(served: Server):
    help_text = subprocess.run(
        [sys.executable, "-m", "loraplex.cli.main", "serve", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    named = set(re.findall(r"`(--[a-z-]+)`", README))
    assert named and all(flag in help_text for flag in named)


def test_the_requests_that_the_server_prints_work(served: Server):
    tries = served.log.split("Try it:\n")[1].splitlines()
    commands = [Path(line.split()[0]).name for line in tries[:6]]
    assert commands == ["loraplex", "loraplex", "python", "buf", "curl", "curl"]
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    for line in tries[:6]:
        result = subprocess.run(
            ["bash", "-c", line], stdin=subprocess.DEVNULL, env=environment, capture_output=True, timeout=60
        )
        assert result.returncode == 0, (line, result.stderr.decode())
        assert b'"error"' not in result.stdout, (line, result.stdout.decode())
