"""Whole shard processes: one that stops, one that cannot load, and a group of two."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from transformers import PreTrainedModel

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.generation_pb2 import Sampling
from loraplex_protos.shard_pb2_grpc import ShardServiceStub
from loraplex_shard.checkpoint import CheckpointError
from loraplex_shard.serving.server import run
from loraplex_shard.settings import ShardSettings
from tests.shard.planner import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    VOCAB,
    Planner,
    Stream,
    greedy,
    random_tokens,
    save_adapter,
    save_llama,
)

pytestmark = pytest.mark.slow

TIMEOUT = 90
PROMPT = random_tokens(20, 1)
# Ends like `loraplex shard`, without Python's finalization: a gRPC thread that returns to Python afterwards would abort
# the process.
PROGRAM = """
import os, sys
from loraplex_protos.errors import LoraplexError
from loraplex_shard.serving.server import run
from loraplex_shard.settings import ShardSettings
try:
    run(ShardSettings.model_validate_json(sys.argv[1]))
except SystemExit as end:
    os._exit(end.code)
except LoraplexError as error:
    print(error, file=sys.stderr, flush=True)
    os._exit(1)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> PreTrainedModel:
    return save_llama(checkpoint)


@dataclass
class TwoRanks:
    """The two ranks of a group without a router."""

    processes: list[subprocess.Popen[str]]
    shards: list[ShardServiceStub]


@contextmanager
def shard_process(settings: ShardSettings) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROGRAM, settings.model_dump_json()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def connected(settings: ShardSettings) -> Iterator[ShardServiceStub]:
    """Waits until the process serves, and connects to it."""
    with grpc.insecure_channel(settings.listen) as channel:
        grpc.channel_ready_future(channel).result(TIMEOUT)
        yield ShardServiceStub(channel)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_shard_stops_cleanly_even_during_a_stream(
    checkpoint: Path, reference: PreTrainedModel, tmp_path: Path, number: signal.Signals
) -> None:
    settings = ShardSettings(
        model=str(checkpoint),
        listen=f"unix:{tmp_path}/rank.sock",
        dtype="float32",
        kv_blocks=40,
        max_sequences=4,
        drain_seconds=0,
    )
    with shard_process(settings) as process, connected(settings) as shard:
        info = shard.GetInfo(pb.GetInfoRequest())
        assert (info.architecture, info.dtype, info.vocab_size) == ("LlamaForCausalLM", "float32", VOCAB)
        assert (info.max_model_len, info.block_size, info.num_blocks) == (MAX_MODEL_LEN, BLOCK_SIZE, 40)
        assert (info.rank, info.tensor_parallel_size, info.max_sequences) == (0, 1, 4)
        assert info.max_batch_tokens == 256 and info.longest_step_us > 0
        assert info.memory.cache > 0 and info.memory.adapters == info.adapter_host_bytes > 0
        assert (info.adapter_device_bytes, info.memory.steps) == (0, 0)  # on a CPU
        assert list(info.end_token_ids) == [2]
        tokenizer = shard.GetTokenizer(pb.GetTokenizerRequest())
        assert (b'"w95"' in tokenizer.tokenizer_json, tokenizer.eos_token) == (True, "w2")
        shard.Reset(pb.ResetRequest())
        planner = Planner()
        planner.start(0, PROMPT)
        with Stream(shard) as stream:
            planner.run(stream.step, {0: len(PROMPT)})
            planner.decode(stream.step, [0], 3)
            process.send_signal(number)
            assert process.wait(TIMEOUT) == 0
        assert planner.rows[0].outputs == greedy(reference, PROMPT, 4)


def test_a_stopping_shard_reports_it_and_continues_until_its_router_leaves(
    checkpoint: Path, reference: PreTrainedModel, tmp_path: Path
) -> None:
    settings = ShardSettings(
        model=str(checkpoint), listen=f"unix:{tmp_path}/rank.sock", dtype="float32", kv_blocks=40, drain_seconds=TIMEOUT
    )
    with shard_process(settings) as process, connected(settings) as shard, grpc.insecure_channel(settings.listen) as c:
        health = HealthStub(c).Watch(HealthCheckRequest())
        assert next(health).status == HealthCheckResponse.SERVING
        planner = Planner()
        planner.start(0, PROMPT)
        with Stream(shard) as stream:
            planner.run(stream.step, {0: len(PROMPT)})
            assert shard.GetInfo(pb.GetInfoRequest()).driven
            process.send_signal(signal.SIGTERM)
            assert next(health).status == HealthCheckResponse.NOT_SERVING
            planner.decode(stream.step, [0], 10)
            assert process.poll() is None
            stream.close()
        health.cancel()
        assert process.wait(TIMEOUT) == 0
        assert planner.rows[0].outputs == greedy(reference, PROMPT, 11)


def test_a_checkpoint_that_cannot_be_served_is_an_error_before_a_port_opens(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        run(ShardSettings(model=str(tmp_path), listen=f"unix:{tmp_path}/rank.sock"))
    assert not (tmp_path / "rank.sock").exists()


def settings_of_two_ranks(checkpoint: Path, folder: Path, **more: Any) -> list[ShardSettings]:
    return [
        ShardSettings(
            model=str(checkpoint),
            dtype="float32",
            tp=2,
            rank=rank,
            rendezvous=f"file://{folder}/rendezvous",
            listen=f"unix:{folder}/rank-{rank}.sock",
            threads=1,
            **more,
        )
        for rank in (0, 1)
    ]


def test_two_ranks_answer_as_one_and_end_together(checkpoint: Path, reference: PreTrainedModel, tmp_path: Path) -> None:
    tuned = save_adapter(checkpoint, tmp_path / "adapters" / "tuned", seed=5, lora_rank=4)
    ranks = settings_of_two_ranks(checkpoint, tmp_path, adapters=tmp_path / "adapters", max_sequences=4)
    with ExitStack() as stack:
        processes = [stack.enter_context(shard_process(settings)) for settings in ranks]
        shards = [stack.enter_context(connected(settings)) for settings in ranks]
        infos = [shard.GetInfo(pb.GetInfoRequest()) for shard in shards]
        assert infos[0].num_blocks == infos[1].num_blocks
        for shard in shards:
            shard.Reset(pb.ResetRequest())
        staged = [shard.StageAdapter(pb.StageAdapterRequest(id="tuned")) for shard in shards]
        assert staged[0].digest == staged[1].digest
        for shard in shards:
            shard.LoadAdapter(pb.LoadAdapterRequest(digest=staged[0].digest, slot=1))
        streams = [stack.enter_context(Stream(shard)) for shard in shards]

        def step(plan: pb.StepRequest) -> pb.StepResponse:
            for stream in streams:
                stream.send(plan)
            response, other = (stream.receive() for stream in streams)
            assert (other.step, len(other.tokens), len(other.token_counts)) == (plan.step, 0, 0)
            assert other.duration_us > 0
            return response

        planner = Planner()
        planner.start(0, PROMPT, prompt_logprobs=True)
        planner.start(1, PROMPT, slot=1)
        planner.start(2, PROMPT, sampling=Sampling(temperature=1))
        response = planner.run(step, dict.fromkeys(range(3), len(PROMPT)))
        assert len(response.prompt_logprobs) == len(PROMPT) - 1
        planner.decode(step, range(3), 7)
        assert planner.rows[0].outputs == greedy(reference, PROMPT, 8)
        assert planner.rows[1].outputs == greedy(tuned, PROMPT, 8)

        plan = planner.plan({0: 1})
        wrong = pb.StepRequest.FromString(plan.SerializeToString())
        wrong.slots[0] = 7  # it holds no adapters
        streams[0].send(plan)
        streams[1].send(wrong)
        reasons = "rank 1 has left", "rank 1 failed"
        for rank, (stream, reason) in enumerate(zip(streams, reasons, strict=True)):
            with pytest.raises(grpc.RpcError, match=reason):
                stream.receive()
            assert processes[rank].wait(TIMEOUT) == 1


@pytest.fixture
def two_ranks(checkpoint: Path, reference: PreTrainedModel, tmp_path: Path) -> Iterator[TwoRanks]:
    settings = settings_of_two_ranks(checkpoint, tmp_path, kv_blocks=40)
    with ExitStack() as stack:
        processes = [stack.enter_context(shard_process(each)) for each in settings]
        shards = [stack.enter_context(connected(each)) for each in settings]
        yield TwoRanks(processes, shards)


def test_an_idle_rank_ends_when_the_other_one_is_killed(two_ranks: TwoRanks) -> None:
    killed, other = two_ranks.processes
    killed.kill()
    assert other.wait(TIMEOUT) == 1
    assert other.stderr is not None and "rank 1: another rank has ended" in other.stderr.read()


def test_both_ranks_end_if_one_was_suspended_in_a_step_until_the_router_left(two_ranks: TwoRanks) -> None:
    stopped, other = two_ranks.processes
    planner = Planner()
    planner.start(0, PROMPT)
    with ExitStack() as stack:
        streams = [stack.enter_context(Stream(shard)) for shard in two_ranks.shards]

        def step(plan: pb.StepRequest) -> pb.StepResponse:
            for stream in streams:
                stream.send(plan)
            response, _ = (stream.receive() for stream in streams)
            return response

        planner.run(step, {0: len(PROMPT)})
        stopped.send_signal(signal.SIGSTOP)
        plan = planner.plan({0: 1})
        for stream in streams:
            stream.send(plan)
        two_ranks.shards[1].GetInfo(pb.GetInfoRequest())  # the plan has arrived
        for stream in streams:
            stream.call.cancel()
    assert other.wait(TIMEOUT) == 1
    assert other.stderr is not None and "rank 1: a step hangs" in other.stderr.read()
    stopped.send_signal(signal.SIGCONT)
    assert stopped.wait(TIMEOUT) == 1
