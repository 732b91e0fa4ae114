"""The shard's calls over a real socket: plans in order, one stream, typed errors, and no delayed steps."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from transformers import PreTrainedModel

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.errors import AdapterInUseError, AdapterNotFoundError, LoraplexError, from_rpc_error
from loraplex_protos.shard_pb2_grpc import ShardServiceStub
from loraplex_shard.device.parallel import Group
from loraplex_shard.lora.epoch import OnLeave
from loraplex_shard.lora.listing import LocalListing
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.sources.local import LocalSource
from loraplex_shard.lora.store import AdapterStore, StagedAdapter
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.observation.metrics import ShardMetrics
from loraplex_shard.observation.telemetry import Telemetry
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.serving.server import WORKERS, start
from loraplex_shard.serving.service import ShardService
from loraplex_shard.serving.steps import StepThread
from loraplex_shard.settings import SettingsError
from loraplex_shard.stepping.runner import Runner
from tests.shard.decoders import load
from tests.shard.planner import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    NUM_BLOCKS,
    Planner,
    Stream,
    greedy,
    random_tokens,
    save_adapter,
    save_llama,
)

CPU = torch.device("cpu")
PROMPT = random_tokens(20, 1)
TIMEOUT = 30


class SlowAdapters:
    """An adapter store that only stages once `may_go_on` is set, or its client leaves."""

    def __init__(self) -> None:
        self.staging, self.may_go_on = threading.Event(), threading.Event()
        self.coming = threading.Semaphore(0)  # released by each call

    def stage(self, id: str, source: str, revision: str, token: str, on_leave: OnLeave) -> StagedAdapter:
        assert on_leave(self.may_go_on.set)
        self.staging.set()
        self.coming.release()
        assert self.may_go_on.wait(TIMEOUT)
        return StagedAdapter("digest", "hub", "commit", lora_rank=1, size_bytes=1, device_bytes=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> PreTrainedModel:
    return save_llama(checkpoint)


@pytest.fixture(scope="module")
def decoder(checkpoint: Path, reference: PreTrainedModel) -> Decoder:
    return load(checkpoint, max_model_len=MAX_MODEL_LEN)


@pytest.fixture
def failed_step() -> threading.Event:
    return threading.Event()


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/rank-0.sock"


def service_with(
    adapters: AdapterStore,
    decoder: Decoder,
    failed_step: threading.Event,
    directory: Path | None = None,
    on_failure: Callable[[], None] = lambda: None,
) -> ShardService:
    cache = decoder.new_cache(NUM_BLOCKS, BLOCK_SIZE)
    grammars = GrammarCompiler(b"{}", decoder.vocab_size, end_token_ids=(2,))
    runner = Runner(decoder, cache, adapters, Group(0, 1), 8, MAX_MODEL_LEN, CPU, grammars)
    info = pb.GetInfoResponse(model_id="tiny", rank=0, num_blocks=NUM_BLOCKS)
    tokenizer = pb.GetTokenizerResponse(tokenizer_json=b"{}")
    steps = StepThread(runner, CPU, failed_step.set)
    listing = LocalListing(directory, lambda config: (), lambda config: None, lambda config, shapes: None)
    return ShardService(steps, adapters, listing, grammars, info, tokenizer, Telemetry(ShardMetrics()), on_failure)


@pytest.fixture
def service(decoder: Decoder, failed_step: threading.Event, tmp_path: Path) -> ShardService:
    adapters = AdapterStore(decoder.layouts, torch.float32, CPU, BaseModel("LlamaForCausalLM"), [LocalSource(tmp_path)])
    return service_with(adapters, decoder, failed_step, tmp_path)


@pytest.fixture
def channel(service: ShardService, address: str) -> Iterator[grpc.Channel]:
    server, _ = start(service, address)
    with grpc.insecure_channel(address) as channel:
        yield channel
    server.stop(None).wait()


@pytest.fixture
def shard(channel: grpc.Channel) -> ShardServiceStub:
    return ShardServiceStub(channel)


def first_answer(shard: ShardServiceStub, plan: pb.StepRequest) -> pb.StepResponse:
    """The answer on a new stream, which is opened as soon as the shard has noticed that the last one ended."""
    for _ in range(TIMEOUT * 100):
        try:
            with Stream(shard) as stream:
                return stream.step(plan)
        except grpc.RpcError as refused:
            assert refused.code() == grpc.StatusCode.FAILED_PRECONDITION
            time.sleep(0.01)
    raise TimeoutError


def first_plan() -> pb.StepRequest:
    planner = Planner()
    planner.start(0, PROMPT)
    return planner.plan({0: len(PROMPT)})


def test_a_plan_may_be_sent_before_the_last_result_is_read(
    shard: ShardServiceStub, failed_step: threading.Event, reference: PreTrainedModel
) -> None:
    planner = Planner()
    planner.start(0, PROMPT)
    with Stream(shard) as stream:
        plans = [planner.plan({0: len(PROMPT)})]
        stream.send(plans[0])
        for _ in range(9):
            plans.append(planner.plan({0: 1}))
            stream.send(plans[-1])
            response = stream.receive()
            assert response.duration_us > 0
            planner.read(plans[-2], response)
        planner.read(plans[-1], stream.receive())
        stream.close()
    assert planner.rows[0].outputs == greedy(reference, PROMPT, 10)
    assert not failed_step.is_set()


def test_a_second_stream_is_refused_while_one_is_open(shard: ShardServiceStub) -> None:
    with Stream(shard) as stream:
        stream.step(first_plan())
        with Stream(shard) as second, pytest.raises(grpc.RpcError) as refused:
            second.step(first_plan())
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(grpc.RpcError) as refused:
            shard.Reset(pb.ResetRequest())
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        stream.close()


def test_a_new_stream_starts_without_rows(
    shard: ShardServiceStub, failed_step: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    with Stream(shard) as stream:
        stream.step(first_plan())
        stream.close()
    decode = pb.StepRequest(step=0, rows=[0], lengths=[1], slots=[0], samples=[True], block_counts=[0])
    with caplog.at_level(logging.CRITICAL), Stream(shard) as stream, pytest.raises(grpc.RpcError) as failed:
        stream.step(decode)
    assert failed.value.code() == grpc.StatusCode.INTERNAL
    assert "rank 0 failed: AssertionError" in failed.value.details()
    assert failed_step.wait(TIMEOUT)


def test_an_unexpected_error_is_logged_with_its_traceback_and_the_next_stream_works(
    shard: ShardServiceStub, caplog: pytest.LogCaptureFixture
) -> None:
    plan = first_plan()
    plan.slots[0] = 3
    with Stream(shard) as stream, pytest.raises(grpc.RpcError) as failed:
        stream.step(plan)
    error = from_rpc_error(failed.value)
    assert type(error) is LoraplexError
    assert "rank 0 failed: KeyError" in error.message
    assert any(record.exc_info and "rank 0" in record.getMessage() for record in caplog.records)
    with Stream(shard) as stream:
        assert list(stream.step(first_plan()).token_counts) == [1]
        stream.close()


def test_plans_are_numbered_from_zero_on_each_stream(shard: ShardServiceStub) -> None:
    plan = first_plan()
    plan.step = 1
    with Stream(shard) as stream, pytest.raises(grpc.RpcError, match="plan 1 came as plan 0"):
        stream.step(plan)


def test_a_lost_router_makes_room_for_the_next(shard: ShardServiceStub, failed_step: threading.Event) -> None:
    with Stream(shard) as stream:
        stream.step(first_plan())
        stream.send(pb.StepRequest(step=1, rows=[0], lengths=[1], slots=[0], samples=[True], block_counts=[0]))
        stream.call.cancel()
    next_stream = first_answer(shard, first_plan())
    assert list(next_stream.token_counts) == [1]
    assert not failed_step.is_set()


def test_the_shard_is_not_hanging_once_all_work_of_a_router_has_ended(
    shard: ShardServiceStub, service: ShardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard.Reset(pb.ResetRequest())
    with Stream(shard) as stream:
        stream.step(first_plan())
        stream.call.cancel()
    first_answer(shard, first_plan())
    monkeypatch.setattr(StepThread, "longest_rest", -1.0)
    assert service.wait_until_left(TIMEOUT)
    shard.GetInfo(pb.GetInfoRequest())  # gRPC reports a call's end once another call has been answered
    assert not service.hangs


def test_the_shard_counts_as_hanging_if_work_for_a_lost_router_continues_too_long(
    shard: ShardServiceStub, service: ShardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, may_go_on = threading.Event(), threading.Event()

    def clear(self: AdapterStore) -> None:
        running.set()
        assert may_go_on.wait(TIMEOUT)

    monkeypatch.setattr(AdapterStore, "clear", clear)
    call = shard.Reset.future(pb.ResetRequest())
    assert running.wait(TIMEOUT)
    monkeypatch.setattr(StepThread, "longest_rest", -1.0)
    assert not service.hangs
    call.cancel()
    while not service.hangs:
        time.sleep(0.01)
    may_go_on.set()
    while service.hangs:
        time.sleep(0.01)


def test_prompts_may_exceed_grpcs_default_message_size(shard: ShardServiceStub) -> None:
    plan = first_plan()
    plan.starts[0].tokens.extend([1] * (5 << 20))
    with Stream(shard) as stream, pytest.raises(grpc.RpcError, match="AssertionError") as failed:
        stream.step(plan)
    assert failed.value.code() == grpc.StatusCode.INTERNAL


def test_adapters_are_staged_loaded_used_and_forgotten(
    shard: ShardServiceStub, checkpoint: Path, reference: PreTrainedModel, tmp_path: Path
) -> None:
    model = save_adapter(checkpoint, tmp_path / "tuned", seed=5, lora_rank=4)
    (listed,) = shard.ListLocalAdapters(pb.ListLocalAdaptersRequest()).adapters
    assert (listed.id, listed.fault) == ("tuned", "")
    assert shard.FetchAdapter(pb.FetchAdapterRequest(id="tuned")).size_bytes == 0  # it lies there
    assert not shard.ListFetches(pb.ListFetchesRequest()).fetches
    asked = pb.RefuseAdaptersRequest(adapters=[pb.FetchAdapterRequest(id="a", source="ftp")])
    (reason,) = shard.RefuseAdapters(asked).reasons
    assert "no adapter source 'ftp'" in reason
    staged = shard.StageAdapter(pb.StageAdapterRequest(id="tuned"))
    assert (staged.source, staged.lora_rank, len(staged.digest)) == ("local", 4, 64)
    assert staged.size_bytes > 0
    shard.LoadAdapter(pb.LoadAdapterRequest(digest=staged.digest, slot=2))
    planner = Planner()
    planner.start(0, PROMPT, slot=2)
    planner.start(1, PROMPT)
    with Stream(shard) as stream:
        planner.run(stream.step, {0: len(PROMPT), 1: len(PROMPT)})
        planner.decode(stream.step, [0, 1], 5)
        stream.close()
    assert planner.rows[0].outputs == greedy(model, PROMPT, 6)
    assert planner.rows[1].outputs == greedy(reference, PROMPT, 6)
    with pytest.raises(grpc.RpcError) as refused:
        shard.UnstageAdapter(pb.UnstageAdapterRequest(digest=staged.digest))
    assert isinstance(from_rpc_error(refused.value), AdapterInUseError)
    shard.UnloadAdapter(pb.UnloadAdapterRequest(slot=2))
    shard.UnstageAdapter(pb.UnstageAdapterRequest(digest=staged.digest))
    with pytest.raises(grpc.RpcError) as refused:
        shard.LoadAdapter(pb.LoadAdapterRequest(digest=staged.digest, slot=2))
    assert isinstance(from_rpc_error(refused.value), AdapterNotFoundError)


def test_errors_of_adapters_keep_their_type_across_the_wire(shard: ShardServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        shard.StageAdapter(pb.StageAdapterRequest(id="missing", source="local", token="secret"))
    error = from_rpc_error(refused.value)
    assert isinstance(error, AdapterNotFoundError)
    assert "missing" in error.message and "secret" not in error.message


def test_an_adapter_that_fails_to_load_for_no_fault_of_its_own_is_reported_to_the_process(
    decoder: Decoder, address: str, failed_step: threading.Event
) -> None:
    class BrokenAdapters:
        def load(self, digest: str, slot: int) -> None:
            raise LoraplexError("not staged") if slot == 1 else RuntimeError("CUDA error: unspecified launch failure")

    adapters: Any = BrokenAdapters()
    failures = SimpleQueue[None]()
    server, _ = start(service_with(adapters, decoder, failed_step, on_failure=lambda: failures.put(None)), address)
    with grpc.insecure_channel(address) as channel:
        for slot, message, reported in (1, "not staged", 0), (2, "unspecified launch failure", 1):
            with pytest.raises(grpc.RpcError, match=message):
                ShardServiceStub(channel).LoadAdapter(pb.LoadAdapterRequest(digest="digest", slot=slot))
            assert failures.qsize() == reported
    server.stop(None).wait()


def test_a_slow_adapter_source_does_not_delay_steps(
    decoder: Decoder, address: str, failed_step: threading.Event
) -> None:
    adapters: Any = SlowAdapters()
    server, _ = start(service_with(adapters, decoder, failed_step), address)
    with grpc.insecure_channel(address) as channel, Stream(ShardServiceStub(channel)) as stream:
        slow = ShardServiceStub(channel).StageAdapter.future(pb.StageAdapterRequest(id="org/slow"))
        assert adapters.staging.wait(TIMEOUT)
        assert list(stream.step(first_plan()).token_counts) == [1]
        assert not slow.done()
        adapters.may_go_on.set()
        assert slow.result(TIMEOUT).digest == "digest"
        stream.close()
    server.stop(None).wait()


def occupy_all_threads(channel: grpc.Channel, adapters: SlowAdapters) -> list[Any]:
    """The calls that stage adapters whose source does not answer."""
    stage = ShardServiceStub(channel).StageAdapter
    slow = [stage.future(pb.StageAdapterRequest(id=f"org/{number}")) for number in range(WORKERS)]
    assert all(adapters.coming.acquire(timeout=TIMEOUT) for _ in slow)
    return slow


def test_the_health_service_answers_while_slow_adapter_sources_occupy_all_threads(
    decoder: Decoder, address: str, failed_step: threading.Event
) -> None:
    adapters: Any = SlowAdapters()
    server, _ = start(service_with(adapters, decoder, failed_step), address)
    with grpc.insecure_channel(address) as channel:
        slow = occupy_all_threads(channel, adapters)
        answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=TIMEOUT / 2)
        assert answer.status == HealthCheckResponse.SERVING
        adapters.may_go_on.set()
        assert all(call.result(TIMEOUT).digest == "digest" for call in slow)
    server.stop(None).wait()


def test_calls_whose_client_has_left_give_their_threads_back(
    decoder: Decoder, address: str, failed_step: threading.Event
) -> None:
    adapters: Any = SlowAdapters()
    server, _ = start(service_with(adapters, decoder, failed_step), address)
    with grpc.insecure_channel(address) as channel:
        slow = occupy_all_threads(channel, adapters)
        for call in slow:
            call.cancel()
        assert ShardServiceStub(channel).GetInfo(pb.GetInfoRequest(), timeout=TIMEOUT / 2).model_id == "tiny"
    server.stop(None).wait()


def test_info_and_tokenizer_are_answered_while_a_stream_is_open(shard: ShardServiceStub) -> None:
    with Stream(shard) as stream:
        stream.step(first_plan())
        assert shard.GetInfo(pb.GetInfoRequest()).model_id == "tiny"
        assert shard.GetTokenizer(pb.GetTokenizerRequest()).tokenizer_json == b"{}"
        stream.close()


@pytest.mark.parametrize("service_name", ["", "loraplex.shard.v1.ShardService"])
def test_the_standard_health_check_is_answered(channel: grpc.Channel, service_name: str) -> None:
    answer = HealthStub(channel).Check(HealthCheckRequest(service=service_name))
    assert answer.status == HealthCheckResponse.SERVING


def test_an_address_that_cannot_be_opened_is_named(service: ShardService, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"listen: cannot open unix:.*no/such/folder"):
        start(service, f"unix:{tmp_path}/no/such/folder/rank.sock")


def test_a_grammar_that_many_ask_for_at_once_is_compiled_once(service: ShardService) -> None:
    callers, compiled = 4, list[pb.Grammar]()

    def compile_slowly(grammar: pb.Grammar) -> list[pb.UnenforcedSchema]:
        compiled.append(grammar)
        (running,) = service._compiling._running.values()
        until = time.monotonic() + 60
        while len(running._condition._waiters) < callers - 1 and time.monotonic() < until:
            time.sleep(0.001)
        return [pb.UnenforcedSchema(field="grammar")]

    service._grammars = SimpleNamespace(of=lambda adapter: SimpleNamespace(unenforced=compile_slowly))
    request = pb.CompileGrammarRequest(grammar=pb.Grammar(text="a"))
    with ThreadPoolExecutor(callers) as threads:
        answers = list(threads.map(lambda _: service.CompileGrammar(request, None), range(callers)))
    assert len(compiled) == 1
    assert [answer.unenforced[0].field for answer in answers] == ["grammar"] * callers
