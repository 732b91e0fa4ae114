"""Runs the folder's batches, in one router at a time. Every line is a request of the HTTP API, as its tenant would send
it, and background work."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, suppress
from typing import Any, TypeAlias

from loraplex_protos.errors import OverloadedError, UnavailableError
from loraplex_router.batches.folder import BatchFolder
from loraplex_router.batches.job import Job
from loraplex_router.batches.reading import Line
from loraplex_router.batches.records import BatchRecord, Status

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two looks at the folder: for the lock, new batches and cancellations
CLEAN_SECONDS = 3600.0
MOST_LINES = 64  # in flight, of all batches together
BUSY = {OverloadedError.http_status, UnavailableError.http_status}
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before a line that met a busy server, or a full disk, is tried again

# Answers a request of a tenant: its path and body; status, request id and body.
Answer: TypeAlias = Callable[[str, str, dict[str, Any]], Awaitable[tuple[int, str, dict[str, Any]]]]


class BatchRunner:
    """`longest`: the most bytes of a request. `max_queue`: sequences that may wait, a quarter of which it uses at
    most."""

    def __init__(self, folder: BatchFolder, answer: Answer, longest: int, max_queue: int) -> None:
        self._folder = folder
        self._answer = answer
        self._longest = longest
        self._places = asyncio.Semaphore(max(1, min(MOST_LINES, max_queue // 4)))
        self._running: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Never returns. When it is cancelled, the lines in flight are given up: whoever runs the batch next computes
        them again."""
        cleaned = 0.0
        try:
            while True:
                try:
                    if await asyncio.to_thread(self._folder.lock):
                        if time.monotonic() > cleaned + CLEAN_SECONDS:
                            cleaned = time.monotonic()
                            await asyncio.to_thread(self._folder.delete_expired)
                        for tenant, record in await asyncio.to_thread(self._folder.unfinished):
                            if record.id not in self._running:
                                self._start(tenant, record)
                except OSError as error:
                    logger.error("the folder of batches fails, and is looked at again in %g s: %s", LONGEST_WAIT, error)
                    await asyncio.sleep(LONGEST_WAIT)
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)
            self._folder.unlock()

    def _start(self, tenant: str, record: BatchRecord) -> None:
        task = self._running[record.id] = asyncio.create_task(self._run(tenant, record.id))
        task.add_done_callback(lambda _: self._running.pop(record.id))

    async def _run(self, tenant: str, id: str) -> None:
        """Runs a batch to its end. If that fails, as on a full disk, it is begun again later."""
        try:
            record = await asyncio.to_thread(self._folder.batch, tenant, id)
            if record.status is Status.CANCELLING and record.in_progress_at is None:
                record.cancelled_at = await asyncio.to_thread(self._folder.now)
                record.status = Status.CANCELLED
                await asyncio.to_thread(self._folder.write_batch, tenant, record)
                return
            with closing(Job(self._folder, tenant, record)) as job:
                if not await asyncio.to_thread(job.begin, self._longest):
                    return
                logger.info("batch %s: %d of %d lines remain", id, _open(record), record.request_counts.total)
                status = await self._run_lines(job)
                await asyncio.to_thread(job.finish, status)
                logger.info("batch %s: %s", id, status)
        except Exception:
            logger.exception("batch %s stopped; it is tried again in %g s", id, LONGEST_WAIT)
            await asyncio.sleep(LONGEST_WAIT)

    async def _run_lines(self, job: Job) -> Status:
        lines = asyncio.create_task(self._send_all(job))
        record, saved = job.record, job.record.request_counts.model_copy()
        try:
            while not lines.done():
                await asyncio.wait([lines], timeout=LOOK_SECONDS)
                if await asyncio.to_thread(self._folder.cancelled, job.tenant, record.id):
                    record.cancelling_at = record.cancelling_at or await asyncio.to_thread(self._folder.now)
                    return Status.CANCELLED
                if await asyncio.to_thread(self._folder.now) > record.expires_at:
                    return Status.EXPIRED
                if saved != record.request_counts:
                    saved = record.request_counts.model_copy()
                    await asyncio.to_thread(job.save)
            await lines
            return Status.COMPLETED
        finally:
            lines.cancel()
            with suppress(asyncio.CancelledError):
                await lines

    async def _send_all(self, job: Job) -> None:
        remaining = job.remaining()
        async with asyncio.TaskGroup() as group:
            while True:
                await self._places.acquire()
                try:
                    line = await asyncio.to_thread(_next, remaining)
                except BaseException:
                    self._places.release()
                    raise
                if line is None:
                    self._places.release()
                    return
                task = group.create_task(self._send(job, line))
                task.add_done_callback(lambda _: self._places.release())

    async def _send(self, job: Job, line: Line) -> None:
        wait = FIRST_WAIT
        while True:
            status, request_id, body = await self._answer(job.tenant, line.url, line.body)
            if status not in BUSY:
                break
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
        await asyncio.to_thread(job.add, line, status, request_id, body)


def _open(record: BatchRecord) -> int:
    counts = record.request_counts
    return counts.total - counts.completed - counts.failed


def _next(lines: Iterator[Line]) -> Line | None:
    return next(lines, None)
