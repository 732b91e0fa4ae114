"""Adapters are read in processes of their own, which may die."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import BoundedSemaphore
from typing import TypeVar, TypeVarTuple

import psutil
import pytest
import torch

from loraplex_protos.errors import (
    AdapterInvalidError,
    AdapterSourceError,
    FieldViolation,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from loraplex_shard.device.priority import NICE, gently
from loraplex_shard.lora import stager as stagers
from loraplex_shard.lora import stager_process
from loraplex_shard.lora.peft import patterns
from loraplex_shard.lora.sources.local import LocalSource
from loraplex_shard.lora.stager import Stager
from loraplex_shard.lora.store import AdapterStore
from loraplex_shard.shapes.adapter import AdapterWeights
from tests.shard.lora_models import BASE, contents, edit_tensors, layouts, save_adapter, whole_deltas

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

RANK = """
import socket
from tests.shard.test_stager import Shared, Stager, call
connection, other_end = socket.socketpair()
stager = Stager({"shared": Shared()})
print(call(stager, Shared.of(stager).process)[0], flush=True)
call(stager, Shared.of(stager).linger)
"""


class Shared:
    """What the rank and its stager both have."""

    @staticmethod
    def of(stager: Stager) -> "Shared":
        shared = stager._shared["shared"]
        assert isinstance(shared, Shared)
        return shared

    def process(self) -> tuple[int, int, int, int]:
        """Of the stager and of the call's process: their ids; the latter's priority, and how readily it is killed."""
        score = int(Path("/proc/self/oom_score_adj").read_text())
        return os.getppid(), os.getpid(), os.getpriority(os.PRIO_PROCESS, 0), score

    def fail(self, error: Exception) -> None:
        raise error

    def linger(self) -> None:
        print(os.getpid(), flush=True)
        time.sleep(600)

    def work_a_little_for(self, seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)
        return "done"

    def be_killed(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def be_asked_to_end(self) -> str:
        """With the stager, as by a supervisor that asks all processes."""
        for number in signal.SIGTERM, signal.SIGINT:
            for process in os.getppid(), os.getpid():
                os.kill(process, number)
        return "still here"


def call(stager: Stager, work: Callable[[*Ts], T], *args: *Ts) -> T:
    """Makes a call in a process of its own."""
    with stager.process() as process:
        return process.call(work, *args)


@pytest.fixture
def stager() -> Iterator[Stager]:
    with closing(Stager({"shared": Shared()})) as stager:
        yield stager


def test_each_call_is_a_process_of_low_priority_that_is_killed_first_when_memory_runs_out(stager: Stager) -> None:
    shared = Shared.of(stager)
    first, second = call(stager, shared.process), call(stager, shared.process)
    assert first[0] == second[0] and first[1] != second[1]
    assert call(stager, os.getenv, "TOKIO_WORKER_THREADS") == "1"
    assert first[2:] == (min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE), 1000)


def test_work_that_gives_way_has_low_priority_and_raises_here() -> None:
    def fail() -> None:
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == min(19, before + NICE)
        raise OSError("it failed")

    before = os.getpriority(os.PRIO_PROCESS, 0)
    with pytest.raises(OSError, match="it failed"):
        gently(fail)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_errors_arrive_as_they_were_raised(stager: Stager) -> None:
    shared = Shared.of(stager)
    with pytest.raises(AdapterInvalidError, match="a wrong tensor"):
        call(stager, shared.fail, AdapterInvalidError("a wrong tensor"))
    with pytest.raises(InvalidRequestError) as raised:
        call(stager, shared.fail, InvalidRequestError(FieldViolation("merged_adapters", "is wrong")))
    assert raised.value.violations == (FieldViolation("merged_adapters", "is wrong"),)
    assert str(raised.value) == "merged_adapters: is wrong"
    with pytest.raises(RuntimeError, match="KeyError: 'a fault of ours'"):
        call(stager, shared.fail, KeyError("a fault of ours"))


def test_a_call_whose_process_is_killed_fails_alone(stager: Stager) -> None:
    shared = Shared.of(stager)
    with pytest.raises(OverloadedError, match="has been killed"):
        call(stager, shared.be_killed)
    assert call(stager, shared.process)[0] != os.getpid()


def test_garbage_of_the_rank_is_not_collected_in_its_stager_and_calls() -> None:
    rank = os.getpid()

    class Garbage:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            if os.getpid() != rank:
                os._exit(1)

    gc.disable()
    try:
        Garbage()
        with closing(Stager({})) as stager:
            assert call(stager, gc.collect) >= 0
    finally:
        gc.enable()


@pytest.mark.parametrize("hangs", ["stager", "call"])
def test_a_process_that_stands_still_before_its_first_call_is_ended(
    monkeypatch: pytest.MonkeyPatch, hangs: str
) -> None:
    monkeypatch.setattr(stagers, "HANG_SECONDS", 1.0)
    monkeypatch.setattr(stagers, "LOOK_SECONDS", 0.25)
    lost = threading.Event()
    if hangs == "call":
        monkeypatch.setattr(stager_process, "_answer", lambda connection, shared: time.sleep(600))
    with closing(Stager({"shared": Shared()}, lost.set)) as stager:
        shared = Shared.of(stager)
        if hangs == "stager":
            os.kill(call(stager, shared.process)[0], signal.SIGSTOP)
        with pytest.raises(AdapterSourceError, match="has not answered"):
            call(stager, shared.process)
        assert lost.wait(60 if hangs == "stager" else 0.1) == (hangs == "stager")


def test_a_call_that_hangs_is_ended_and_gives_up_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stagers, "HANG_SECONDS", 2.0)
    monkeypatch.setattr(stagers, "LOOK_SECONDS", 0.25)
    with closing(Stager({"shared": Shared()})) as stager:
        stager._places = BoundedSemaphore(1)
        shared = Shared.of(stager)
        with stager.process() as hanging:
            process = psutil.Process(hanging.call(shared.process)[1])
            with pytest.raises(AdapterSourceError, match=r"has not answered for 2 s"):
                hanging.compute(shared.linger)
            process.wait(60)
        with stager.process() as working:
            assert working.compute(shared.work_a_little_for, 2.5) == "done"


def test_a_signal_to_all_processes_leaves_the_stager_and_what_it_reads_to_their_rank() -> None:
    lost = threading.Event()
    with closing(Stager({"shared": Shared()}, lost.set)) as stager:
        shared = Shared.of(stager)
        assert call(stager, shared.be_asked_to_end) == "still here"
        assert call(stager, shared.be_asked_to_end) == "still here"
        assert not lost.is_set()


def test_a_program_that_is_killed_while_an_adapter_is_read_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_MATCHER", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with closing(Stager({})) as stager, pytest.raises(AdapterInvalidError, match="cannot be matched"):
        call(stager, patterns.matching_names, "target_modules", ["q.*"], ["q_proj"])


def test_the_rank_learns_at_once_that_its_stager_has_ended() -> None:
    lost = threading.Event()
    with closing(Stager({"shared": Shared()}, lost.set)) as stager:
        psutil.Process(call(stager, Shared.of(stager).process)[0]).kill()
        assert lost.wait(60)
        with pytest.raises(UnavailableError, match="its shard restarts"):
            call(stager, Shared.of(stager).process)


def test_a_stager_that_is_closed_is_not_lost() -> None:
    lost = threading.Event()
    stager = Stager({"shared": Shared()}, lost.set)
    process = psutil.Process(call(stager, Shared.of(stager).process)[0])
    stager.close()
    process.wait(60)
    assert not lost.wait(0.2)


def test_a_stager_and_its_calls_end_with_their_rank_however_that_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        processes = [psutil.Process(int(rank.stdout.readline())) for _ in ("stager", "call")]
        rank.kill()
    deadline = time.monotonic() + 60
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_adapters_that_are_read_apart_are_the_same(tmp_path: Path) -> None:
    for name in "first", "second":
        save_adapter(tmp_path / name, seed=len(name), r=4)
    stores = [
        AdapterStore(layouts(), dtype, torch.device("cpu"), BASE, [LocalSource(tmp_path)])
        for dtype in (torch.float32, torch.float32, torch.int8, torch.int8)
    ]
    with closing(stores[1].read_apart()), closing(stores[3].read_apart()):
        for store in stores:
            for slot, name in enumerate(("first", "second"), start=1):
                store.load(store.stage(name, "local", "", "").digest, slot)
        for here, apart in (stores[:2], stores[2:]):
            for slot in 1, 2:
                expected, actual = here.adapter_in(slot), apart.adapter_in(slot)
                torch.testing.assert_close(actual.memory, expected.memory, rtol=0, atol=0)
                torch.testing.assert_close(whole_deltas([actual]), whole_deltas([expected]), rtol=0, atol=0)
                for adapter in actual, actual.at(actual.memory.clone()):
                    made = AdapterWeights(adapter.layers, adapter.layer_count, adapter.memory).table
                    torch.testing.assert_close(adapter.table, made, rtol=0, atol=0)
                assert (actual.widest, actual.int8, actual.size_bytes) == (
                    expected.widest,
                    expected.int8,
                    expected.size_bytes,
                )
        shutil.copytree(tmp_path / "first", tmp_path / "broken")
        edit_tensors(tmp_path / "broken", lambda tensors: tensors.popitem())
        messages = []
        for store in stores:
            with pytest.raises(AdapterInvalidError) as raised:
                store.stage("broken", "local", "", "")
            messages.append(raised.value.message)
        assert len(set(messages)) == 1


def test_an_upload_that_is_read_apart_is_the_same_and_its_memory_goes_back(tmp_path: Path) -> None:
    save_adapter(tmp_path / "first", r=4)
    files = contents(tmp_path / "first")
    sizes = {name: len(data) for name, data in files.items()}
    here, apart = (
        AdapterStore(layouts(), torch.float32, torch.device("cpu"), BASE, [LocalSource(tmp_path)]) for _ in range(2)
    )
    expected = here.stage("first", "local", "", "")
    rank, opened = psutil.Process(), set[int]()
    with closing(apart.read_apart()):
        for _ in range(3):
            staged = apart.stage_upload(sizes, iter(files.values()))
            assert (staged.digest, staged.size_bytes) == (expected.digest, expected.size_bytes)
            apart.unstage(staged.digest)
            opened.add(rank.num_fds())
            assert not [each.path for each in rank.memory_maps() if "memfd:adapter" in each.path]
    assert len(opened) == 1
