"""The thread that runs plans: it never waits for the reading of plans or results, and keeps streams separate."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
import torch

from loraplex_protos.shard_pb2 import StepRequest, StepResponse
from loraplex_shard.serving.steps import StepThread
from loraplex_shard.stepping.results import PendingStep

CPU = torch.device("cpu")
TIMEOUT = 30


class Recorder:
    """A runner that records its calls. A plan waits for `may_go_on`, and a plan of row 9 fails."""

    def __init__(self) -> None:
        self.calls: list[int | str] = []
        self.threads = set[int]()
        self.running, self.may_go_on = threading.Event(), threading.Event()
        self.may_go_on.set()
        self.pending: dict[int, Any] = {}  # by plan: steps that a device still computes

    def clear(self) -> None:
        self._note("clear")

    def begin(self, plan: StepRequest) -> PendingStep:
        self.running.set()
        assert self.may_go_on.wait(TIMEOUT)
        self._note(plan.step)
        if list(plan.rows) == [9]:
            raise MemoryError("row 9")
        return self.pending.pop(plan.step, PendingStep(plan.step, CPU, None))

    def _note(self, call: int | str) -> None:
        self.calls.append(call)
        self.threads.add(threading.get_ident())


class Computing:
    """A step that a device computes until `done`; then it fails with `error`, if there is one."""

    def __init__(self, step: int, error: Exception | None = None) -> None:
        self.step, self.error, self.done = step, error, threading.Event()

    def wait(self) -> float:
        assert self.done.wait(TIMEOUT)
        if self.error:
            raise self.error
        return time.monotonic()

    def response(self) -> StepResponse:
        self.wait()
        return StepResponse(step=self.step)


class Plans:
    """A stream of plans; `read` is set once the shard has read all of them."""

    def __init__(self, *plans: StepRequest) -> None:
        self.plans = SimpleQueue[StepRequest | None]()
        self.read = threading.Event()
        for plan in plans:
            self.plans.put(plan)

    def __iter__(self) -> Iterator[StepRequest]:
        while True:
            if self.plans.empty():
                self.read.set()
            if (plan := self.plans.get(timeout=TIMEOUT)) is None:
                return
            yield plan


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def failed_step() -> threading.Event:
    return threading.Event()


@pytest.fixture
def steps(recorder: Any, failed_step: threading.Event) -> StepThread:
    return StepThread(recorder, CPU, failed_step.set)


def plan(number: int, row: int = 0) -> StepRequest:
    return StepRequest(step=number, rows=[row])


def wait_for_thread(steps: StepThread) -> None:
    """Until all that has been read was run."""
    steps._thread.submit(int).result(TIMEOUT)


def test_plans_run_even_if_nobody_has_read_a_result(steps: StepThread, recorder: Recorder) -> None:
    plans = Plans(plan(0), plan(1), plan(2), plan(3))
    with closing(steps.run(iter(plans))) as results:
        assert next(results).response.step == 0
        assert plans.read.wait(TIMEOUT)
        wait_for_thread(steps)
        assert recorder.calls == ["clear", 0, 1, 2, 3]
        plans.plans.put(None)
        assert [step.response.step for step in results] == [1, 2, 3]


def test_plans_are_read_and_results_are_sent_while_a_plan_runs(steps: StepThread, recorder: Recorder) -> None:
    plans = Plans(plan(0))
    with closing(steps.run(iter(plans))) as results:
        first = next(results)
        recorder.may_go_on.clear()
        recorder.running.clear()
        plans.plans.put(plan(1))
        assert recorder.running.wait(TIMEOUT)
        plans.read.clear()
        plans.plans.put(plan(2))
        assert plans.read.wait(TIMEOUT)
        assert recorder.calls == ["clear", 0]
        recorder.may_go_on.set()
        second, third = next(results), next(results)
        plans.plans.put(None)
        assert list(results) == []
    assert first.ended <= second.began <= second.ended <= third.began


def test_the_next_plan_begins_while_the_device_computes_and_its_time_begins_after_that(
    steps: StepThread, recorder: Recorder
) -> None:
    recorder.pending = {0: (first := Computing(0)), 1: (second := Computing(1))}
    plans = Plans(plan(0), plan(1))
    with closing(steps.run(iter(plans))) as results, ThreadPoolExecutor(1) as sender:
        one_later = sender.submit(next, results)
        assert plans.read.wait(TIMEOUT)
        wait_for_thread(steps)
        assert recorder.calls == ["clear", 0, 1]
        first.done.set()
        one = one_later.result(TIMEOUT)
        second.done.set()
        two = next(results)
        plans.plans.put(None)
        assert list(results) == []
    assert [one.response.step, two.response.step] == [0, 1]
    assert one.ended == two.began


def test_an_error_of_the_device_ends_the_stream_as_one_of_the_plan_does(
    steps: StepThread, recorder: Recorder, failed_step: threading.Event
) -> None:
    recorder.pending = {0: (lost := Computing(0, error=RuntimeError("the device is lost")))}
    lost.done.set()
    plans = Plans(plan(0))
    results = steps.run(iter(plans))
    with pytest.raises(RuntimeError, match="the device is lost"):
        next(results)
    assert failed_step.is_set()
    plans.read.clear()
    plans.plans.put(plan(1))
    assert plans.read.wait(TIMEOUT)
    wait_for_thread(steps)
    assert recorder.calls == ["clear", 0]
    plans.plans.put(None)


def test_an_error_of_the_device_is_reported_while_the_next_plan_hangs_or_nobody_reads(
    steps: StepThread, recorder: Recorder, failed_step: threading.Event
) -> None:
    recorder.pending = {0: (lost := Computing(0, error=RuntimeError("the device is lost")))}
    plans = Plans(plan(0))
    results = steps.run(iter(plans))
    with ThreadPoolExecutor(1) as answering:
        answer = answering.submit(next, results)
        assert plans.read.wait(TIMEOUT)
        wait_for_thread(steps)
        recorder.may_go_on.clear()
        plans.plans.put(plan(1))
        lost.done.set()
        assert failed_step.wait(TIMEOUT)
        recorder.may_go_on.set()
        with pytest.raises(RuntimeError, match="the device is lost"):
            answer.result(TIMEOUT)
    plans.plans.put(None)

    failed_step.clear()
    recorder.pending = {1: (lost := Computing(1, error=RuntimeError("the device is lost")))}
    lost.done.set()
    plans = Plans(plan(0), plan(1))
    plans.plans.put(None)
    results = steps.run(iter(plans))
    next(results)
    results.close()
    assert failed_step.is_set()


def test_a_closed_stream_has_been_computed(steps: StepThread, recorder: Recorder) -> None:
    recorder.pending = {1: (last := Computing(1))}
    plans = Plans(plan(0), plan(1))
    plans.plans.put(None)
    results = steps.run(iter(plans))
    next(results)
    closed = threading.Thread(target=results.close)
    closed.start()
    closed.join(0.1)
    assert closed.is_alive()
    last.done.set()
    closed.join(TIMEOUT)
    assert not closed.is_alive()


def test_everything_runs_on_one_thread(steps: StepThread, recorder: Recorder) -> None:
    for _ in range(2):
        plans = Plans(plan(0), plan(1))
        plans.plans.put(None)
        assert len(list(steps.run(iter(plans)))) == 2
    assert recorder.calls == ["clear", 0, 1, "clear", 0, 1]
    assert len(recorder.threads) == 1
    assert threading.get_ident() not in recorder.threads


def test_plans_after_a_failed_one_do_not_run(
    steps: StepThread, recorder: Recorder, failed_step: threading.Event
) -> None:
    failing = Plans(plan(0), plan(1, row=9), plan(2))
    results = steps.run(iter(failing))
    assert next(results).response.step == 0
    with pytest.raises(MemoryError, match="row 9"):
        next(results)
    assert failed_step.is_set()
    assert failing.read.wait(TIMEOUT)
    next_stream = Plans(plan(0))
    next_stream.plans.put(None)
    assert len(list(steps.run(iter(next_stream)))) == 1
    failing.read.clear()
    failing.plans.put(plan(3))  # arrives late, and does not run either
    assert failing.read.wait(TIMEOUT)
    wait_for_thread(steps)
    assert recorder.calls == ["clear", 0, 1, "clear", 0]
    failing.plans.put(None)


def test_a_stream_ends_once_its_plans_have_run(steps: StepThread, recorder: Recorder) -> None:
    plans = Plans(plan(0))
    results = steps.run(iter(plans))
    next(results)
    recorder.may_go_on.clear()
    plans.plans.put(plan(1))
    plans.plans.put(plan(2))
    plans.plans.put(None)
    left = threading.Thread(target=results.close)
    left.start()
    assert recorder.calls == ["clear", 0]
    recorder.may_go_on.set()
    left.join(TIMEOUT)
    assert recorder.calls == ["clear", 0, 1, 2]


def test_a_lost_router_ends_the_stream(steps: StepThread) -> None:
    def plans() -> Iterator[StepRequest]:
        yield plan(0)
        raise grpc.RpcError

    assert [step.response.step for step in steps.run(plans())] == [0]
