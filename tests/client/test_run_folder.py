"""Folders of processes that were killed are deleted by the next process, and no others."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from loraplex.cli.run_folder import run_folder

HOLD = """
from loraplex.cli.run_folder import run_folder
with run_folder() as folder:
    print(folder, flush=True)
    input()
"""


def hold() -> tuple["subprocess.Popen[str]", Path]:
    """A process that has a folder, and the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_what_a_process_that_was_killed_left_is_deleted_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    somebodys = tmp_path / "loraplex-adapters"  # has the form of such a name
    somebodys.mkdir()
    killed, left = hold()
    (left / "rank0.sock").touch()
    killed.kill()
    killed.communicate()
    living, held = hold()
    assert not left.exists() and held.exists()
    with run_folder() as own:
        assert {*tmp_path.iterdir()} == {Path(own), held, somebodys}
    living.communicate("\n")
    assert [*tmp_path.iterdir()] == [somebodys]
