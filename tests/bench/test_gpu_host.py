"""The host's part of a step on a GPU is measured where there is none."""

import subprocess
import sys
from pathlib import Path

SMALL = "from bench.gpu.host import host_table; print(*host_table((2,), (0, 2), 1).columns[4].cells)"


def test_launches_per_layer_are_counted_without_a_gpu() -> None:
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", SMALL], cwd=root, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    without, with_adapters = map(int, result.stdout.split())
    assert without == 6  # two norms, rotation, attention over two runs of positions, activation
    assert with_adapters == without + 2 * 4  # both products of each linear layer
