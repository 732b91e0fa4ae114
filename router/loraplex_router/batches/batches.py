"""Files and batches, wherever they are kept: the rules that hold for a folder and for a bucket."""

import asyncio
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import IO, TypeAlias, TypeVar

from loraplex_protos.errors import (
    BatchNotFoundError,
    FieldViolation,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
    quote,
)
from loraplex_router.batches.job import Job
from loraplex_router.batches.records import (
    FILE_SECONDS,
    BatchRecord,
    ExpiresAfter,
    FileRecord,
    Status,
    new_batch_id,
    new_file_id,
)
from loraplex_router.fair_slots import FairSlots

WINDOW_SECONDS = 24 * 3600  # how long a batch may take
MOST_FILES = 1000  # of a tenant
MOST_BATCHES = 1000  # of a tenant, those that have ended included
THREADS = 16

FILE_ID = re.compile(r"file-[0-9a-f]{24}")
BATCH_ID = re.compile(r"batch_[0-9a-f]{24}")

Content: TypeAlias = Path | Iterator[bytes]
R = TypeVar("R")


class Batches(ABC):
    """Blocks while it reads and writes: use `ask` or `work`. If its place fails, it raises UnavailableError, or OSError
    where only the runner calls it.

    A batch's record is written when it is created, and from then on only by the router that runs it.
    """

    look_seconds: float  # between two looks for new batches and for cancellations
    clean_seconds: float  # between two calls of `delete_expired`

    def __init__(self, most_bytes: int) -> None:
        """`most_bytes`: of all files together."""
        self._most_bytes = most_bytes
        # Of its own: nothing else waits for a place that hangs, and requests do not wait for batches that begin.
        self._asking, self._working = (ThreadPoolExecutor(THREADS, name) for name in ("batches", "batch runner"))
        self._turns = FairSlots(THREADS)  # for those that ask

    async def ask(self, tenant: str, seconds: float, function: Callable[..., R], *arguments: object) -> R:
        """Calls it in a thread, for a request of the tenant, which has as many threads as it leaves free. Raises
        OverloadedError if none was free for it after so many seconds, UnavailableError if the call takes longer. A call
        that hangs keeps its thread."""
        async with AsyncExitStack() as taking:
            try:
                async with asyncio.timeout(seconds):
                    await taking.enter_async_context(self._turns.taken(tenant))
            except TimeoutError:
                raise OverloadedError("too many requests for files and batches wait: try again later") from None
            call = asyncio.create_task(self._call(taking.pop_all(), partial(function, *arguments)))
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(call)
        except TimeoutError:
            raise UnavailableError("the storage of files and batches does not answer: try again later") from None

    async def _call(self, turn: AsyncExitStack, function: Callable[[], R]) -> R:
        async with turn:
            return await asyncio.get_running_loop().run_in_executor(self._asking, function)

    async def work(self, function: Callable[..., R], *arguments: object) -> R:
        """Calls it in a thread, for the runner."""
        return await asyncio.get_running_loop().run_in_executor(self._working, partial(function, *arguments))

    # ---- what routes ask -------------------------------------------------------------------------------------

    def add_file(
        self, tenant: str, filename: str, purpose: str, content: IO[bytes], expires_after: ExpiresAfter | None = None
    ) -> FileRecord:
        """Raises InvalidRequestError if the tenant's own files leave no room for it, UnavailableError if those of
        others do."""
        size = content.seek(0, os.SEEK_END)
        content.seek(0)
        self._check_room(tenant, size)
        if self._count_files(tenant) >= MOST_FILES:
            raise InvalidRequestError(FieldViolation("file", f"is one too many: {MOST_FILES} are kept, delete some"))
        id = new_file_id()
        try:
            self._write_content(tenant, id, content)
            return self.register_file(tenant, id, filename, purpose, size, expires_after)
        except BaseException:
            with suppress(UnavailableError):
                self._remove_file(tenant, id)
            raise

    def _check_room(self, tenant: str, size: int) -> None:
        """With keys, a tenant has half of the room that others leave, so that there is always some for somebody else.
        Without keys, it is everyone, has no name, and may have all of it. Answers of batches count, but find room
        beyond that."""
        used, parts = self._used_bytes(), 2 if tenant else 1
        own = used[tenant_folder(tenant)]
        share = (self._most_bytes - (used.total() - own)) // parts
        if share < size <= self._most_bytes // parts:
            raise UnavailableError("the files of others leave no room for this one: try again later")
        if own + size > share:
            most = f"{max(share, 0) / 2**30:.3g} GiB"
            description = f"has no room: your files would have more than {most}, delete some"
            raise InvalidRequestError(FieldViolation("file", description))

    def register_file(
        self, tenant: str, id: str, filename: str, purpose: str, size: int, expires_after: ExpiresAfter | None
    ) -> FileRecord:
        """Lists a file whose content is complete."""
        now = self.now()
        record = FileRecord(
            id=id,
            bytes=size,
            created_at=now,
            expires_at=now + (expires_after.seconds if expires_after else FILE_SECONDS),
            filename=filename,
            purpose=purpose,
        )
        self._write_file(tenant, record)
        return record

    def file(self, tenant: str, id: str) -> FileRecord:
        """Raises BatchNotFoundError."""
        found = self._find_file(tenant, id) if FILE_ID.fullmatch(id) else None
        if found is None:
            raise BatchNotFoundError(f"there is no file {quote(id)}")
        return found

    def delete_file(self, tenant: str, id: str) -> None:
        """Raises BatchNotFoundError, and InvalidRequestError if a batch that has not ended needs it."""
        self.file(tenant, id)
        if any(id == batch.input_file_id and not batch.status.final for batch in self.batches(tenant)):
            raise InvalidRequestError(FieldViolation("file_id", "is the input of a batch that has not ended"))
        self._remove_file(tenant, id)

    def add_batch(
        self,
        tenant: str,
        input_file_id: str,
        endpoint: str,
        window: str,
        metadata: dict[str, str] | None = None,
        output_expires_after: ExpiresAfter | None = None,
    ) -> BatchRecord:
        """Raises BatchNotFoundError for an unknown file, and InvalidRequestError for one that is not for batches."""
        if self.file(tenant, input_file_id).purpose != "batch":
            raise InvalidRequestError(FieldViolation("input_file_id", 'must be a file with the purpose "batch"'))
        if self._count_batches(tenant) >= MOST_BATCHES:
            description = f"is one too many: {MOST_BATCHES} are kept for {FILE_SECONDS // 86400} days"
            raise InvalidRequestError(FieldViolation("batch", description))
        now = self.now()
        record = BatchRecord(
            id=new_batch_id(),
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=window,
            created_at=now,
            expires_at=now + WINDOW_SECONDS,
            metadata=metadata,
            output_expires_after=output_expires_after,
        )
        self._create_batch(tenant, record)
        return record

    def batch(self, tenant: str, id: str) -> BatchRecord:
        """Raises BatchNotFoundError."""
        found = self._find_batch(tenant, id) if BATCH_ID.fullmatch(id) else None
        if found is None:
            raise BatchNotFoundError(f"there is no batch {quote(id)}")
        return found

    def cancel(self, tenant: str, id: str) -> BatchRecord:
        """Asks for it; a batch that has ended stays as it is. Raises BatchNotFoundError."""
        record = self.batch(tenant, id)
        if record.status.final:
            return record
        self._ask_to_cancel(tenant, id)
        return self.batch(tenant, id)

    @abstractmethod
    def files(self, tenant: str) -> list[FileRecord]:
        """Newest first."""

    @abstractmethod
    def batches(self, tenant: str) -> list[BatchRecord]:
        """Newest first."""

    @abstractmethod
    def content(self, tenant: str, id: str) -> Content:
        """A file that is there, or the pieces of one; the first piece is asked for when it is taken. Raises
        BatchNotFoundError, then or now."""

    # ---- what the runner asks --------------------------------------------------------------------------------

    @abstractmethod
    def lock(self) -> bool:
        """Whether this process runs the batches; if not, another router does."""

    @abstractmethod
    def unlock(self) -> None:
        """Lets another router run them at once."""

    @property
    @abstractmethod
    def locked(self) -> bool:
        """Whether this process still runs them. Does not block."""

    @abstractmethod
    def now(self) -> int:
        """A time.time by the clock of the place: those of its routers may be wrong."""

    @abstractmethod
    def unfinished(self) -> list[tuple[str, str]]:
        """Every tenant's batches that have not ended, oldest first: the tenant's name and the batch's id."""

    @abstractmethod
    def job(self, tenant: str, id: str) -> Job | None:
        """A run of a batch. None: it has ended, or is not written down yet."""

    @abstractmethod
    def cancelled(self, tenant: str, id: str) -> bool:
        """Whether it was asked for, at the last call of `unfinished` or later."""

    @abstractmethod
    def delete_expired(self) -> None:
        """Deletes files, and batches that have ended, when their time is over. The input of a batch that has not ended
        stays until it has."""

    # ---- how it is kept --------------------------------------------------------------------------------------

    @abstractmethod
    def _used_bytes(self) -> Counter[str]:
        """By tenants' folders."""

    @abstractmethod
    def _count_files(self, tenant: str) -> int: ...

    @abstractmethod
    def _count_batches(self, tenant: str) -> int: ...

    @abstractmethod
    def _write_content(self, tenant: str, id: str, content: IO[bytes]) -> None: ...

    @abstractmethod
    def _write_file(self, tenant: str, record: FileRecord) -> None: ...

    @abstractmethod
    def _find_file(self, tenant: str, id: str) -> FileRecord | None: ...

    @abstractmethod
    def _remove_file(self, tenant: str, id: str) -> None: ...

    @abstractmethod
    def _create_batch(self, tenant: str, record: BatchRecord) -> None: ...

    @abstractmethod
    def _find_batch(self, tenant: str, id: str) -> BatchRecord | None: ...

    @abstractmethod
    def _ask_to_cancel(self, tenant: str, id: str) -> None: ...


def tenant_folder(name: str) -> str:
    """What stands for a tenant in paths."""
    return sha256(name.encode()).hexdigest()[:32]


def shown(record: BatchRecord, asked: int | None) -> BatchRecord:
    """The record as clients see it. `asked`: when they asked to cancel it."""
    if record.status.final or asked is None:
        return record
    return record.model_copy(update={"status": Status.CANCELLING, "cancelling_at": asked})
