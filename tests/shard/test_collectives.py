"""Ranks on one host compute together through shared memory, and notice when one of them is lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loraplex_shard.kernels.library import build, instruction_set
from tests.shard.operations import kernels_directory
from tests.shard.sharing_process import LAST, SIZE

pytestmark = pytest.mark.slow

Seen = list[dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """The results of three ranks, the last of which kills itself at the end."""
    directory = tmp_path_factory.mktemp("sharing")
    build(kernels_directory(), instruction_set())  # compiles outside the ranks' time limit
    command = [sys.executable, "-m", "tests.shard.sharing_process"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    ranks = [subprocess.Popen([*command, str(rank), str(directory)], cwd=root, env=environment) for rank in range(SIZE)]
    try:
        codes = [rank.wait(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0] * LAST + [-signal.SIGKILL]
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(SIZE)]


def test_all_ranks_get_bitwise_equal_sums_of_any_size(seen: Seen) -> None:
    assert [rank["wrong sums"] for rank in seen] == [[]] * SIZE


def test_a_broadcast_sends_rank_0s_values(seen: Seen) -> None:
    assert all(rank["broadcast"] for rank in seen)


def test_a_gather_puts_columns_side_by_side(seen: Seen) -> None:
    assert all(rank["gather"] for rank in seen)


def test_a_program_runs_all_of_its_sums(seen: Seen) -> None:
    assert [rank["sum of a program"] for rank in seen] == [SIZE**2] * SIZE


def test_the_rank_that_made_the_memory_is_seen_live(seen: Seen) -> None:
    assert [rank["first is late"] for rank in seen] == ["none"] * SIZE


def test_the_memory_has_no_name_once_all_have_mapped_it(seen: Seen) -> None:
    names = seen[0]["names"]  # rank 0 removes the name
    assert len(names) == 5 and all(name.endswith(" (deleted)") for name in names)


def test_ranks_on_two_hosts_do_not_share(seen: Seen) -> None:
    assert [rank["two hosts share"] for rank in seen] == [False] * SIZE


def test_no_rank_shares_memory_if_one_has_no_kernels(seen: Seen) -> None:
    assert [rank["without kernels on rank 1"] for rank in seen] == [False] * SIZE


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("late", "rank 2 is more than 2 s behind"),
        ("left", "rank 2 has left"),
        ("died", "rank 2 has left"),
        ("died in a program", "rank 2 has left"),
    ],
)
def test_the_others_fail_if_a_rank_does_not_arrive(how: str, message: str, seen: Seen) -> None:
    assert all(message in rank[how] for rank in seen[:LAST])
