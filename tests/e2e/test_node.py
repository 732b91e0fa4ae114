"""`loraplex shard` with all ranks of a machine: they serve together, and end together."""

import signal
from pathlib import Path

import grpc
import psutil
import pytest

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.shard_pb2_grpc import ShardServiceStub
from tests.e2e.processes import START_SECONDS, Shard, free_port


@pytest.mark.parametrize(
    ("told", "status", "log"), [(True, 0, "is serving at"), (False, 1, "rank 1 was killed by SIGKILL")]
)
def test_all_ranks_of_a_machine_are_one_command_that_ends_with_any_of_them(
    told: bool, status: int, log: str, model: Path
):
    port = free_port()
    flags = "--tp=2", "--kv-blocks=64", "--threads=1", "--drain-seconds=1"
    with Shard(f"--model={model}", f"--listen=127.0.0.1:{port}", *flags) as shard:
        for rank in range(2):
            with grpc.insecure_channel(f"127.0.0.1:{port + rank}") as channel:
                grpc.channel_ready_future(channel).result(START_SECONDS)
                info = ShardServiceStub(channel).GetInfo(pb.GetInfoRequest())
                assert (info.rank, info.tensor_parallel_size) == (rank, 2)
        ranks = psutil.Process(shard.process.pid).children()
        if told:
            assert shard.terminate() == status
        else:
            next(rank for rank in ranks if "--rank=1" in rank.cmdline()).send_signal(signal.SIGKILL)
            assert shard.process.wait(60) == status
        psutil.wait_procs(ranks, 60)
        assert not any(rank.is_running() for rank in ranks)
    assert log in shard.log
