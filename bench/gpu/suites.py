"""The tests of operations and of the runner, on the device: what CI runs in Triton's interpreter."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from bench.gpu.check import Check, DeviceName, Row

ROOT = Path(__file__).parents[2]
SUITES = (
    "tests/shard/test_ops_cuda.py",
    "tests/shard/test_cuda_int4.py",
    "tests/shard/test_sampling_cuda.py",
    "tests/shard/test_runner.py",
)
FEW = "large_logits or restarted_sequence"  # Triton's interpreter is slow, and CI runs them anyway
SANITIZED = "adapters_and_the_base or prefix_of_another"
PROCESSES = 12  # most of the time, they compile kernels
SECONDS = 100.0
SECONDS_PER_TEST = 60


def checks(device: DeviceName) -> Iterator[Check]:
    yield Check(" ".join(Path(file).name for file in SUITES), partial(_run, device), SECONDS + 10)
    if device == "cuda":
        yield Check("compute-sanitizer", _sanitize)


def _sanitize() -> Row:
    """Kernels read and write only what is theirs. Each tensor has an allocation of its own."""
    if (tool := shutil.which("compute-sanitizer")) is None:
        return {"compute-sanitizer": "not installed"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    command += [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        *SUITES,
        "-k",
        SANITIZED,
    ]
    env = {**os.environ, "LORAPLEX_TEST_DEVICE": "cuda", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    assert done.returncode == 0, f"status {done.returncode}: {' '.join(found[:20]) or done.stdout[-1500:]}"
    return {"compute-sanitizer": found[-1].strip("= ")}


def _run(device: DeviceName) -> Row:
    """A test that hangs or crashes ends its process; pytest-xdist replaces it and goes on."""
    many = ["-n", str(PROCESSES), f"--timeout={SECONDS_PER_TEST}", "--timeout-method=thread"]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.xml")
        options = ["-v", "-p", "no:cacheprovider", "-p", "bench.gpu.spoilt", "-W", "default", f"--junitxml={report}"]
        options += many if device == "cuda" else ["-k", FEW]
        env = {**os.environ, "LORAPLEX_TEST_DEVICE": "cuda" if device == "cuda" else "interpreter"}
        command = [sys.executable, "-m", "pytest", *SUITES, *options]
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired as error:
            lines = (error.stdout or b"").decode().splitlines()
            counts = ", ".join(f"{sum(word in line for line in lines)} {word}" for word in ("PASSED", "FAILED"))
            names = " ".join(line.split(" ", 2)[-1] for line in lines if "FAILED" in line)
            raise AssertionError(f"the tests took more than {SECONDS:.0f} s; by then, {counts} {names}") from error
        assert report.exists(), f"pytest ended with status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [(case.get("name", ""), found) for case in cases for found in (*case.iter("failure"), *case.iter("error"))]
    if failed:
        listed = "; ".join(f"{name}: {found.get('message', '')[:200]}" for name, found in failed[:12])
        raise AssertionError(f"{len(failed)} of {len(cases)} tests failed: {listed}")
    assert cases and done.returncode == 0, f"pytest ended with status {done.returncode}: {done.stdout[-1500:]}"
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - skipped, "skipped": skipped}
