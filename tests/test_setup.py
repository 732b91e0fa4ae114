"""setup.sh: which Python the virtual environment gets, and the error message if there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "setup.sh"
OLD = """#!/bin/sh
case "$2" in
  *python_version*) echo 3.10.13 ;;
  *) exit 1 ;;
esac
"""
NEW = """#!/bin/sh
case "$2" in
  *ensurepip*) exit {ensurepip} ;;
  *version_info*) echo 3.12 ;;
  venv) mkdir -p "$3/bin" && touch "$3/bin/made-by-new" ;;
esac
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder on the PATH before /usr/bin and /bin."""
    folder = tmp_path / "programs"
    folder.mkdir()
    program(folder / "python3", OLD)
    return folder


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def setup(programs: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    for name in ("python3.11", "python3.12", "python3.13", "python3.14"):  # only those that a test creates should exist
        if not (programs / name).exists():
            program(programs / name, "#!/bin/sh\nexit 127\n")
    environment = {**os.environ, "PATH": f"{programs}:/usr/bin:/bin"}
    command = [str(SETUP), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_python_that_is_too_old_is_reported_in_one_line(programs: Path, tmp_path: Path):
    result = setup(programs, tmp_path / "venv")
    assert result.returncode == 1
    assert result.stderr.startswith("error: loraplex needs Python 3.11 or newer, but python3 is 3.10.13.")
    assert result.stderr.count("\n") == 1 and "make serve PYTHON=" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_a_newer_python_is_found(programs: Path, tmp_path: Path):
    program(programs / "python3.12", NEW.format(ensurepip=0))
    assert setup(programs, tmp_path / "venv").returncode == 0
    assert (tmp_path / "venv" / "bin" / "made-by-new").exists()


def test_an_environment_of_an_old_python_is_replaced(programs: Path, tmp_path: Path):
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    program(tmp_path / "venv" / "bin" / "python", OLD)
    setup(programs, tmp_path / "venv", sys.executable)
    code = "import sys, pip; print(sys.version_info[:2])"
    shown = subprocess.run([tmp_path / "venv" / "bin" / "python", "-c", code], capture_output=True, text=True)
    assert shown.stdout == f"{sys.version_info[:2]}\n"


def test_a_python_without_venv_is_named_with_its_package(programs: Path, tmp_path: Path):
    program(programs / "python3.12", NEW.format(ensurepip=1))
    result = setup(programs, tmp_path / "venv")
    assert result.returncode == 1
    assert "python3.12 cannot create virtual environments. Debian, Ubuntu: apt install python3.12-venv" in result.stderr


def test_only_the_named_python_is_tried(programs: Path, tmp_path: Path):
    program(programs / "python3.12", NEW.format(ensurepip=0))
    result = setup(programs, tmp_path / "venv", "python3")
    assert "python3 is 3.10.13" in result.stderr
