"""Runs batches, in one router at a time. Every line is a request of the HTTP API, as its tenant would send
it, and background work."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias

from loraplex_protos.errors import BatchNotFoundError, OverloadedError, UnavailableError
from loraplex_router.batches.batches import Batches
from loraplex_router.batches.job import Job, TakenOverError
from loraplex_router.batches.reading import Line
from loraplex_router.batches.records import BatchRecord, Status
from loraplex_router.fair_slots import FairSlots
from loraplex_router.loops import keep_running

logger = logging.getLogger(__name__)

MOST_LINES = 64  # of all batches together that are asked at the same time, and of a tenant, those that wait included
BEGINNING = 2  # batches that begin at a time, one of each tenant: their inputs may be long
BUSY = {OverloadedError.http_status, UnavailableError.http_status}
SAVE_SECONDS = 5.0  # for writing down what a router has that stops
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before what met a busy server, or a place that fails, is tried again

# Answers a request of a tenant: its path and body; status, headers (by names in any case) and body.
Answer: TypeAlias = Callable[[str, str, dict[str, Any]], Awaitable[tuple[int, Mapping[str, str], dict[str, Any]]]]


class BatchRunner:
    """`longest`: the most bytes of a request. `max_queue`: sequences that may wait, a quarter of which it uses at
    most."""

    def __init__(self, batches: Batches, answer: Answer, longest: int, max_queue: int) -> None:
        self._batches = batches
        self._answer = answer
        self._longest = longest
        self._places = asyncio.Semaphore(max(1, min(MOST_LINES, max_queue // 4)))
        # A tenant whose limits are reached waits without a place, so that others' batches go on.
        self._lines: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(MOST_LINES))
        self._beginning = FairSlots(BEGINNING)
        self._running: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Never returns. When it is cancelled, the lines in flight are given up: whoever runs the batch next computes
        them again."""
        cleaning = asyncio.create_task(keep_running(self._clean))
        try:
            while True:
                try:
                    if await self._batches.work(self._batches.lock):
                        for tenant, id in await self._batches.work(self._batches.unfinished):
                            if id not in self._running:
                                self._start(tenant, id)
                except (OSError, UnavailableError) as error:
                    logger.error("batches cannot be read, and are looked at again in %g s: %s", LONGEST_WAIT, error)
                    await asyncio.sleep(LONGEST_WAIT)
                await asyncio.sleep(self._batches.look_seconds)
        finally:
            tasks = [cleaning, *self._running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._batches.work(self._batches.unlock)

    async def _clean(self) -> None:
        while True:
            if self._batches.locked:
                try:
                    await self._batches.work(self._batches.delete_expired)
                except (OSError, UnavailableError) as error:
                    logger.error("expired batches cannot be deleted: %s", error)
                await asyncio.sleep(self._batches.clean_seconds)
            await asyncio.sleep(self._batches.look_seconds)

    def _start(self, tenant: str, id: str) -> None:
        task = self._running[id] = asyncio.create_task(self._run(tenant, id))
        task.add_done_callback(lambda _: self._running.pop(id))

    async def _run(self, tenant: str, id: str) -> None:
        """Runs a batch to its end. If that fails, as on a full disk, it is begun again later."""
        work = self._batches.work
        try:
            job = await work(self._batches.job, tenant, id)
            if job is None:
                return
            record = job.record
            async with self._closing(job):
                if record.status is Status.CANCELLING and record.in_progress_at is None:
                    return await work(job.end, Status.CANCELLED)
                async with self._beginning.taken(tenant):
                    if not await work(job.begin, self._longest):
                        return
                logger.info("batch %s: %d of %d lines remain", id, _open(record), record.request_counts.total)
                try:
                    status = await self._run_lines(job)
                except BatchNotFoundError:
                    status = await work(job.lose_input)
                except asyncio.CancelledError:  # the router stops: what it has is for the next one
                    with suppress(OSError, UnavailableError, TakenOverError, TimeoutError):
                        async with asyncio.timeout(SAVE_SECONDS):
                            await work(job.save)
                    raise
                if status:
                    await work(job.finish, status)
                logger.info("batch %s: %s", id, status or "another router may run it now")
        except TakenOverError:
            logger.info("batch %s: another router runs it now", id)
        except UnavailableError as error:
            logger.warning("batch %s stopped; it is tried again in %g s: %s", id, LONGEST_WAIT, error)
            await asyncio.sleep(LONGEST_WAIT)
        except Exception:
            logger.exception("batch %s stopped; it is tried again in %g s", id, LONGEST_WAIT)
            await asyncio.sleep(LONGEST_WAIT)

    @asynccontextmanager
    async def _closing(self, job: Job) -> AsyncIterator[None]:
        try:
            yield
        finally:  # which may have to wait for a place that hangs: not for long if the router stops
            task = asyncio.current_task()
            with suppress(TimeoutError):
                async with asyncio.timeout(SAVE_SECONDS if task and task.cancelling() else None):
                    await self._batches.work(job.close)

    async def _run_lines(self, job: Job) -> Status | None:
        """How the batch ends. None: another router may run it now."""
        lines = asyncio.create_task(self._send_all(job))
        record, work = job.record, self._batches.work
        try:
            while not lines.done():
                await asyncio.wait([lines], timeout=self._batches.look_seconds)
                if not self._batches.locked:
                    return None
                try:
                    if await work(self._batches.cancelled, job.tenant, record.id):
                        record.cancelling_at = record.cancelling_at or await work(self._batches.now)
                        return Status.CANCELLED
                    if await work(self._batches.now) > record.expires_at:
                        return Status.EXPIRED
                    if job.unsaved:
                        await work(job.save)
                except UnavailableError as error:
                    logger.warning("batch %s goes on, but is not written down: %s", record.id, error)
            await lines
            return Status.COMPLETED
        finally:
            lines.cancel()
            await asyncio.wait([lines])
            _ = lines.cancelled() or lines.exception()  # it is known, or does not matter any more

    async def _send_all(self, job: Job) -> None:
        """Raises BatchNotFoundError or UnavailableError if the input cannot be read, when the lines in flight have been
        answered."""
        remaining, lines, failure = job.remaining(), self._lines[job.tenant], None
        async with asyncio.TaskGroup() as group:
            while True:
                await lines.acquire()
                line = None
                try:
                    line = await self._batches.work(_next, remaining)
                except (BatchNotFoundError, UnavailableError) as error:
                    failure = error
                finally:
                    if line is None:
                        lines.release()
                if line is None:
                    break
                task = group.create_task(self._send(job, line))
                task.add_done_callback(lambda _: lines.release())
        if failure:
            raise failure

    async def _send(self, job: Job, line: Line) -> None:
        wait = FIRST_WAIT
        while True:
            async with self._places:
                status, headers, body = await self._answer(job.tenant, line.url, line.body)
            if status not in BUSY:
                break
            if after := headers.get("Retry-After"):
                await asyncio.sleep(float(after))
            else:
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
        while True:
            try:
                return await self._batches.work(job.add, line, status, headers.get("X-Request-Id", ""), body)
            except UnavailableError:
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)


def _open(record: BatchRecord) -> int:
    counts = record.request_counts
    return counts.total - counts.completed - counts.failed


def _next(lines: Iterator[Line]) -> Line | None:
    return next(lines, None)
