"""The thread that runs plans. While it computes, other threads send the last result and read the next plan, so that
the decoder waits for neither. For a GPU it only enqueues: the thread that sends a result waits for it meanwhile.
Independent of gRPC calls and of the plans' content."""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

import grpc
import torch

from loraplex_protos.shard_pb2 import StepRequest, StepResponse
from loraplex_shard.serving import machine
from loraplex_shard.stepping.results import PendingStep
from loraplex_shard.stepping.runner import Runner

# Limit for what is still computed after a router has left: several times the longest step, with a minimum (on a GPU a
# kernel may have to be compiled).
FACTOR = 5.0
LEAST_SECONDS = {"cpu": 5.0, "cuda": 60.0}


@dataclass(frozen=True)
class Step:
    """A plan that was run, between two times of time.monotonic."""

    plan: StepRequest
    response: StepResponse
    began: float
    ended: float


@dataclass(frozen=True)
class BegunStep:
    """A plan that the device may still compute."""

    plan: StepRequest
    pending: PendingStep
    began: float


class StepThread:
    """Runs all of a runner's work, one item after another.

    It is always the same thread, since OpenMP keeps a team of threads per calling thread. on_failed_step is called
    after a plan has raised an error, on whichever thread notices it. `longest_step`: seconds that one of the largest
    steps took.
    """

    def __init__(
        self, runner: Runner, device: torch.device, on_failed_step: Callable[[], None], longest_step: float = 0.0
    ) -> None:
        self._runner = runner
        self._on_failed_step = on_failed_step
        self._thread = ThreadPoolExecutor(1, "steps", initializer=machine.use, initargs=(device,))
        self._stream: object = None  # the one whose plans are run; used only by the thread
        self._least_seconds = LEAST_SECONDS[device.type]
        self._longest = longest_step

    @property
    def longest_rest(self) -> float:
        """Seconds within which the plans received so far are certain to be run, unless one hangs."""
        return max(self._least_seconds, FACTOR * self._longest)

    def run(self, plans: Iterator[StepRequest]) -> Generator[Step]:
        """Forgets all sequences, then runs plans as they arrive, without a pause between plans that are already there.

        `plans` is read on a separate thread; it ends, or raises grpc.RpcError, once no more plans will come. Raises a
        failed plan's error; later plans are not run. May be closed once no more plans will come: this waits until the
        plans that have arrived are run.
        """
        stream = object()
        steps = SimpleQueue[Future[BegunStep] | None]()
        self._thread.submit(self._begin, stream).result()
        threading.Thread(target=self._read, args=(stream, plans, steps), name="plans", daemon=True).start()
        ended = 0.0
        try:
            for future in iter(steps.get, None):
                step = self._finish(future.result(), ended)
                ended = step.ended
                yield step
        except GeneratorExit:
            for future in iter(steps.get, None):
                with suppress(Exception):
                    self._finish(future.result(), ended)
            raise

    def _finish(self, step: BegunStep, last_ended: float) -> Step:
        """Waits for a step. The device began with it when it had ended the last one."""
        try:
            ended = step.pending.wait()
            response = step.pending.response()
        except Exception:
            self._on_failed_step()  # before all else: the thread may hang in the next plan
            self._thread.submit(self._forget).result()
            raise
        began = max(step.began, last_ended)
        self._longest = max(self._longest, ended - began)
        return Step(step.plan, response, began, ended)

    def _read(self, stream: object, plans: Iterator[StepRequest], steps: SimpleQueue[Future[BegunStep] | None]) -> None:
        try:
            for number, plan in enumerate(plans):
                steps.put(self._thread.submit(self._step, stream, number, plan))
        except grpc.RpcError:
            pass  # the router is gone
        finally:
            steps.put(None)

    def _begin(self, stream: object) -> None:
        self._stream = stream
        self._runner.clear()

    def _forget(self) -> None:
        """Later plans of the stream do not run."""
        self._stream = None

    def _step(self, stream: object, number: int, plan: StepRequest) -> BegunStep:
        if stream is not self._stream:
            raise RuntimeError(f"plan {number} follows one that failed")
        began = time.monotonic()
        try:
            assert plan.step == number, f"plan {plan.step} came as plan {number} of its stream"
            return BegunStep(plan, self._runner.begin(plan), began)
        except Exception:
            self._forget()
            self._on_failed_step()
            raise
