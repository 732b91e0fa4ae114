import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bench.__main__ import app
from bench.load import Run
from bench.report import ratios, summarize
from tests.client.scripted import ScriptedServicer


def run(directory: Path, *arguments: str) -> Result:
    out = ["--json", str(directory / "bench.json"), "--plot", str(directory / "bench.png")]
    return CliRunner().invoke(app, [*arguments, *out], env={"COLUMNS": "200"})


def test_two_targets_run_in_turn_and_are_reported_as_ratios(
    address: str, servicer: ScriptedServicer, checkpoint: Path, adapter_directory: Path, tmp_path: Path
) -> None:
    options = ["-c", "2", "-p", "4", "-n", "3", "--requests", "4", "--runs", "2", "--vocab-size", "50"]
    options += ["--adapters", "one,two", "--adapter-dir", str(adapter_directory)]
    targets = [f"grpc://{address}", f"peft:{checkpoint}"]
    result = run(tmp_path, *targets, *options)
    assert (result.exit_code, result.exception) == (0, None)
    assert re.findall(r"run \d/2 (\S+): ", result.stderr) == targets * 2
    for label in ("output tok/s", "TTFT p50", "TTFT p95", "inter-token p50", "inter-token p95", "second / first"):
        assert label in result.stdout
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [target["target"] for target in content["targets"]] == targets
    assert [len(target["runs"]) for target in content["targets"]] == [2, 2]
    assert content["workload"]["adapters"] == ["one", "two"]
    assert content["ratios"]["output_tokens_per_second"] > 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert len(servicer.requests) == 2 * (2 + 4)


def test_adapters_come_from_the_servers_list(address: str, tmp_path: Path) -> None:
    result = run(tmp_path, f"grpc://{address}", *["-c", "1", "-n", "3", "--requests", "1", "--runs", "1", "-k", "1"])
    assert (result.exit_code, result.exception) == (0, None)
    assert "second / first" not in result.stdout
    assert json.loads((tmp_path / "bench.json").read_text())["workload"]["adapters"] == ["sql"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["-k", "9"], "error: -k 9: there are only 2 adapters"),
        (["ftp://x"], "error: ftp://x: a target is"),
    ],
)
def test_an_error_is_one_line(arguments: list[str], error: str, address: str, tmp_path: Path) -> None:
    result = run(tmp_path, f"grpc://{address}", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(error)
    assert not (tmp_path / "bench.json").exists()


def test_without_a_plot_nothing_draws(address: str) -> None:
    script = "import sys; sys.modules['matplotlib'] = None; from bench.__main__ import app; app()"
    workload = [f"grpc://{address}", "-c", "1", "-n", "2", "-p", "2", "--requests", "1", "--runs", "1"]
    result = subprocess.run([sys.executable, "-c", script, *workload], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "output tok/s" in result.stdout


def test_a_missing_matplotlib_is_reported_before_anything_is_measured(
    address: str, servicer: ScriptedServicer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.__main__.find_spec", lambda name: None)
    result = run(tmp_path, f"grpc://{address}")
    assert result.exit_code == 2
    assert "pip install --constraint constraints.txt --editable '.[bench]'" in " ".join(result.stderr.split())
    assert servicer.requests == []


def test_a_target_cannot_be_compared_with_itself(tmp_path: Path) -> None:
    assert run(tmp_path, "grpc://x", "grpc://x").exit_code == 2


def test_ratios_are_of_the_medians_over_the_runs() -> None:
    def runs(*durations: float) -> list[Run]:
        return [Run(duration, output_tokens=12, first_tokens=[duration], gaps=[duration]) for duration in durations]

    results = {"a": runs(1, 2, 9), "b": runs(4, 3, 5)}
    assert summarize(results["a"]).output_tokens_per_second == 6
    assert ratios(results)["output_tokens_per_second"] == 0.5
    assert ratios(results)["ttft_p95"] == 2
    assert ratios({"a": results["a"]}) == {}
