"""Adapters are fetched in processes of their own, too: the tests of fetching_apart.py."""

import subprocess
import sys
from pathlib import Path


def test_adapters_are_fetched_in_forks_of_a_process_that_has_not_fetched_before() -> None:
    """As a rank is. Other tests may have left threads of the sources' libraries here, which a fork would not have."""
    tests = Path(__file__).with_name("fetching_apart.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0 and "3 passed" in run.stdout, run.stdout + run.stderr
