"""Clients that need an environment of their own, because they pin old dependencies; and where Triton's kernels run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports Triton: there is no GPU, so its kernels are interpreted.
os.environ["TRITON_INTERPRET"] = "1"

# No time limit per example: a machine that stalls would fail it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

OLD_CLIENTS = ("lorax-client==0.6.3", "text-generation==0.7.0")


@pytest.fixture(scope="session")
def old_python(pytestconfig: pytest.Config) -> Path:
    """A Python with the old clients; kept between runs."""
    folder = pytestconfig.cache.mkdir("old-clients")
    python = folder / "bin" / "python"
    complete = folder / "complete"
    if not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *OLD_CLIENTS], check=True)
        complete.touch()
    return python
