"""A rank that is restarted alone finds its new group, not what is left of the former one."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

pytestmark = pytest.mark.slow

RANK = """
import sys, time
import torch
from loraplex_shard.device.parallel import Group
from loraplex_shard.device.troubles import GroupLostError
try:
    Group.connect(int(sys.argv[1]), 2, sys.argv[2], torch.device("cpu"), None)
    print("connected", flush=True)
except GroupLostError as error:
    print(error, flush=True)
    raise SystemExit(1)
time.sleep(600)
"""


@contextmanager
def rank(number: int, rendezvous: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", RANK, str(number), rendezvous]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_rank_that_is_back_before_its_former_group_has_ended_ends_and_joins_the_next_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        rendezvous = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with ExitStack() as stack:
        former = [stack.enter_context(rank(number, rendezvous)) for number in range(2)]
        assert [said(process) for process in former] == ["connected"] * 2
        former[1].kill()
        early = stack.enter_context(rank(1, rendezvous))
        assert "rank 1 of 2 has already joined a group" in said(early)
        assert early.wait(60) == 1
        former[0].kill()
        former[0].wait(60)
        next_ones = [stack.enter_context(rank(number, rendezvous)) for number in range(2)]
        assert [said(process) for process in next_ones] == ["connected"] * 2
