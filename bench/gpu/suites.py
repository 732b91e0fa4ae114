"""The tests of operations and of the runner, on the device: what CI runs in Triton's interpreter."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from bench.gpu.check import Check, DeviceName, Row

ROOT = Path(__file__).parents[2]
SUITES = ("tests/shard/test_ops_cuda.py", "tests/shard/test_sampling_cuda.py", "tests/shard/test_runner.py")
FEW = "large_logits or restarted_sequence"  # Triton's interpreter is slow, and CI runs them anyway
PROCESSES = 8  # most of the time, they compile kernels
SECONDS = 110.0  # for a file
SECONDS_PER_TEST = 60


def checks(device: DeviceName) -> Iterator[Check]:
    for files in ((file,) for file in SUITES) if device == "cuda" else (SUITES,):
        yield Check(" ".join(Path(file).name for file in files), partial(_run, device, files), SECONDS)


def _run(device: DeviceName, files: tuple[str, ...]) -> Row:
    """A test that hangs or crashes ends its process; pytest-xdist replaces it and goes on."""
    many = ["-n", str(PROCESSES), f"--timeout={SECONDS_PER_TEST}", "--timeout-method=thread"]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.xml")
        options = ["-q", "-p", "no:cacheprovider", "-p", "bench.gpu.spoilt", "-W", "default", f"--junitxml={report}"]
        options += many if device == "cuda" else ["-k", FEW]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *files, *options],
            cwd=ROOT,
            env={**os.environ, "LORAPLEX_TEST_DEVICE": "cuda" if device == "cuda" else "interpreter"},
            capture_output=True,
            text=True,
        )
        assert report.exists(), f"pytest ended with status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [(case.get("name", ""), found) for case in cases for found in (*case.iter("failure"), *case.iter("error"))]
    if failed:
        listed = "; ".join(f"{name}: {found.get('message', '')[:200]}" for name, found in failed[:12])
        raise AssertionError(f"{len(failed)} of {len(cases)} tests failed: {listed}")
    assert cases and done.returncode == 0, f"pytest ended with status {done.returncode}: {done.stdout[-1500:]}"
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"file": " ".join(files), "passed": len(cases) - skipped, "skipped": skipped}
