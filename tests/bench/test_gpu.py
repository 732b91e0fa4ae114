"""The check of a GPU runs here tiny, on the CPU. A check that fails, crashes or hangs does not end the others."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from bench.gpu import report
from bench.gpu.check import Check, DeviceName, Result, Row, Section
from bench.gpu.isolation import run_section

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_everything_passes_tiny_and_is_written(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", "all", "--device", "cpu", "--minutes", "600", "--json", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    results = json.loads(output.read_text())["results"]
    assert {result["status"] for result in results} == {"PASS"}, done.stdout
    assert len(results) == done.stdout.count("PASS  ")
    assert (tmp_path / "trace.json.gz").exists()
    for result in results:
        assert f"PASS  {result['section']}: {result['check']}" in done.stdout
        assert not result["rows"] or f"\n{result['section']}\n" in done.stdout


# The libraries around transformers that a machine for machine learning has, where torch for CUDA is.
THERE = {
    "accelerate",
    "huggingface-hub",
    "jinja2",
    "numpy",
    "prometheus-client",
    "psutil",
    "pyyaml",
    "rich",
    "safetensors",
    "sentencepiece",
    "tiktoken",
    "torch",
    "typer",
    "uvloop",
}


def test_the_wheels_are_what_the_services_need_besides_the_usual_libraries() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {canonical(line) for line in (*project["dependencies"], *extras["router"], *extras["shard"])}
    lines = (ROOT / "bench/gpu/wheels.txt").read_text().splitlines()
    wheels = {canonical(line) for line in lines if not line.startswith("#")}
    assert wanted - wheels == THERE, "add them to bench/gpu/wheels.txt"
    pinned = {canonical(line) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert wheels <= pinned, "add them to constraints.txt"


def canonical(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def ends(how: str) -> Row:
    match how:
        case "wrong":
            raise ValueError("2 is\nnot 3")
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(1000)
    return {"how": how, "pid": os.getpid()}


def checks(device: DeviceName) -> Iterator[Check]:
    for number, how in enumerate(("well", "wrong", "crash", "hang", "well")):
        yield Check(f"{number} {how}", partial(ends, how), seconds=1.0 if how == "hang" else 300.0)


def hanging(device: DeviceName) -> Iterator[Check]:
    yield Check("hang", partial(ends, "hang"))
    yield Check("well", partial(ends, "well"))


def absent(device: DeviceName) -> Iterator[Check]:
    raise ImportError("no such library")


def run(section: Section, seconds: float) -> list[Result]:
    context = multiprocessing.get_context("spawn")
    return list(run_section(section, "cpu", context, time.monotonic() + seconds))


def test_one_check_does_not_end_the_others() -> None:
    results = run(Section("odd", "check", 0, checks), 900)
    assert [(each.check, each.status) for each in results] == [
        ("0 well", "PASS"),
        ("1 wrong", "FAIL"),
        ("2 crash", "FAIL"),
        ("3 hang", "FAIL"),
        ("4 well", "PASS"),
    ]
    wrong, crash, hang = (result.reason for result in results[1:4])
    assert wrong.startswith("ValueError: 2 is\nnot 3 (") and "test_gpu.py:" in wrong
    assert (crash, hang) == ("its process ended: signal SIGSEGV", "did not end within 1 s")
    table = report.tables(results).split("\n")
    assert table[1:3] == ["odd", f" how{'pid'.rjust(len(table[3]) - 4)}"]
    assert len({line.split()[1] for line in table[3:]}) == 2, "the last check ran in another process"


def test_what_time_does_not_allow_is_late() -> None:
    results = run(Section("long", "check", 0, hanging), 2)
    assert [(each.check, each.status, each.reason) for each in results] in (
        [("(the rest)", "LATE", "from hang on")],
        [("(the rest)", "LATE", "from (start) on")],  # a slow machine
    )
    assert report.summary(results).startswith("0 PASS, 0 FAIL, 1 LATE\nlong: (the rest)")


def test_a_section_that_cannot_begin_fails_once() -> None:
    (result,) = run(Section("absent", "check", 0, absent), 300)
    assert (result.check, result.status, result.reason) == ("(start)", "FAIL", "its process ended: exit status 1")
