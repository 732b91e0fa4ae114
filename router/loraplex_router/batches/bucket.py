"""The bucket in which files and batches are kept. Several routers may use the same one. `layout.py` says which objects
there are."""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import IO, TypeVar

import orjson

from loraplex_protos.errors import BatchNotFoundError
from loraplex_router.batches import layout
from loraplex_router.batches.batches import Batches, shown, tenant_folder
from loraplex_router.batches.bucket_job import BucketJob
from loraplex_router.batches.known import KnownRecords, parsed
from loraplex_router.batches.lease import Lease
from loraplex_router.batches.objects import Objects
from loraplex_router.batches.records import FILE_SECONDS, BatchRecord, FileRecord, newest_first

CLOCK_SECONDS = 60.0  # after which the store's clock is looked at again
FORGOTTEN_SECONDS = 3600  # after which a batch is forgotten that has no record, since its router died
DOWNLOAD_PIECE = 512 << 10  # bytes in memory of each download
NOTHING_USED = b'{"bytes": {}}'

R = TypeVar("R", FileRecord, BatchRecord)


class BatchBucket(Batches):
    look_seconds = 2.0
    clean_seconds = 600.0

    def __init__(self, url: str, most_bytes: int) -> None:
        """`most_bytes`: counted every `clean_seconds`, and what this router writes or deletes in between. Raises
        ValueError for settings in the environment that are wrong or insufficient."""
        super().__init__(most_bytes)
        self.objects = Objects(url)
        self._lease = Lease(self.objects, layout.LEASE)
        self._clock: tuple[float, float] | None = None  # when it was looked at, and how far it is ahead of `monotonic`
        self._known = KnownRecords()
        self._counting = threading.Lock()
        self._tenants: dict[str, str] = {}  # of batches that have not ended
        self._cancelled = set[str]()
        # What the store says, and by tenants' folders what this router has added since it says so.
        self._used: tuple[bytes, Counter[str]] = NOTHING_USED, Counter()

    # ---- files -----------------------------------------------------------------------------------------------

    def files(self, tenant: str) -> list[FileRecord]:
        return newest_first(self._records(layout.files(tenant), FileRecord))

    def content(self, tenant: str, id: str) -> Iterator[bytes]:
        return self.read(tenant, id, piece=DOWNLOAD_PIECE)

    def read(self, tenant: str, id: str, **options: int) -> Iterator[bytes]:
        try:
            yield from self.objects.read(layout.content(tenant, id), **options)
        except FileNotFoundError:
            raise BatchNotFoundError("the file does not exist any more") from None

    def upload(self, tenant: str, id: str, content: IO[bytes] | Iterator[bytes]) -> None:
        self.objects.upload(layout.content(tenant, id), content)

    def remove_files(self, tenant: str, ids: Sequence[str | None]) -> None:
        there = [id for id in ids if id]
        paths = [layout.file(tenant, id) for id in there] + [layout.content(tenant, id) for id in there]
        if paths:
            self.objects.delete(paths)

    def _used_bytes(self) -> Counter[str]:
        found = self.objects.find(layout.USED)
        said = found.content if found else NOTHING_USED
        with self._counting:
            if said != self._used[0]:
                self._used = said, Counter()
            return Counter(orjson.loads(said)["bytes"]) + self._used[1]

    def _add_used(self, tenant: str, bytes: int) -> None:
        self._used_bytes()
        with self._counting:
            self._used[1][tenant_folder(tenant)] += bytes

    def _count_files(self, tenant: str) -> int:
        return sum(1 for _ in self.objects.list(layout.files(tenant)))

    def _write_content(self, tenant: str, id: str, content: IO[bytes]) -> None:
        self.upload(tenant, id, content)

    def _write_file(self, tenant: str, record: FileRecord) -> None:
        if record.expires_at < record.created_at + FILE_SECONDS:
            self.objects.put(layout.expiring(tenant, record.id, record.expires_at), b"")
        self.objects.put(layout.file(tenant, record.id), record.model_dump_json().encode())
        self._add_used(tenant, record.bytes)

    def _find_file(self, tenant: str, id: str) -> FileRecord | None:
        found = self.objects.find(layout.file(tenant, id))
        return parsed(found.content, FileRecord) if found else None

    def _remove_file(self, tenant: str, id: str) -> None:
        record = self._find_file(tenant, id)
        self.remove_files(tenant, [id])
        if record:
            self._add_used(tenant, -record.bytes)

    # ---- batches ---------------------------------------------------------------------------------------------

    def batches(self, tenant: str) -> list[BatchRecord]:
        found = self._records(layout.batches(tenant), BatchRecord)
        asked: dict[str, int] = {}
        if not all(each.status.final for each in found):
            asked = {object.path: object.modified for object in self.objects.list(layout.OPEN)}
        records = [shown(each, asked.get(layout.cancel(each.id))) for each in found]
        return newest_first(records)

    def _count_batches(self, tenant: str) -> int:
        return sum(1 for _ in self.objects.list(layout.batches(tenant)))

    def _create_batch(self, tenant: str, record: BatchRecord) -> None:
        # This comes first, so that none is written down that nobody runs.
        self.objects.put(layout.open(record.id), tenant.encode())
        self.objects.put(layout.batch(tenant, record.id), record.model_dump_json().encode())

    def _find_batch(self, tenant: str, id: str) -> BatchRecord | None:
        found = self.objects.find(layout.batch(tenant, id))
        record = parsed(found.content, BatchRecord) if found else None
        return record and self._shown(record)

    def _ask_to_cancel(self, tenant: str, id: str) -> None:
        self.objects.put(layout.cancel(id), b"")

    def _shown(self, record: BatchRecord) -> BatchRecord:
        return shown(record, None if record.status.final else self.objects.modified(layout.cancel(record.id)))

    # ---- running ---------------------------------------------------------------------------------------------

    def lock(self) -> bool:
        return self._lease.take()

    def unlock(self) -> None:
        self._lease.release()

    @property
    def locked(self) -> bool:
        return self._lease.held

    def now(self) -> int:
        if self._clock is None or monotonic() > self._clock[0] + CLOCK_SECONDS:
            self.objects.put(layout.CLOCK, b"")
            said, here = self.objects.modified(layout.CLOCK), monotonic()
            self._clock = here, (said or 0) - here
        return int(monotonic() + self._clock[1])

    def unfinished(self) -> list[tuple[str, str]]:
        listed = sorted(self.objects.list(layout.OPEN), key=lambda each: (each.modified, each.path))
        ids = [each.path.removeprefix(f"{layout.OPEN}/") for each in listed]
        self._cancelled = {id.removesuffix(layout.CANCEL) for id in ids if id.endswith(layout.CANCEL)}
        ids = [id for id in ids if not id.endswith(layout.CANCEL)]
        new = self.objects.find_all([layout.open(id) for id in ids if id not in self._tenants])
        tenants = self._tenants | {path.removeprefix(f"{layout.OPEN}/"): tenant.decode() for path, tenant in new}
        self._tenants = {id: tenants[id] for id in ids if id in tenants}
        return [(tenant, id) for id, tenant in self._tenants.items()]

    def job(self, tenant: str, id: str) -> BucketJob | None:
        found = self.objects.find(layout.batch(tenant, id))
        record = parsed(found.content, BatchRecord) if found else None
        if found and record and not record.status.final:
            return BucketJob(self, tenant, self._shown(record), found.version)
        if record or (self.objects.modified(layout.open(id)) or 0) + FORGOTTEN_SECONDS < self.now():
            self.forget(id)
        return None

    def forget(self, id: str) -> None:
        """Deletes what is kept of a batch only until it has ended."""
        self.objects.delete([part.path for part in self.objects.list(layout.parts(id))])
        self.objects.delete([layout.cancel(id), layout.open(id)])

    def cancelled(self, tenant: str, id: str) -> bool:
        return id in self._cancelled

    def delete_expired(self) -> None:
        now, used, needed = self.now(), Counter[str](), self._inputs()
        over = {path for each in self.objects.list(layout.EXPIRING) for path in layout.expired(each.path, now)}
        expired = list[str]()
        for object in (each for folder in layout.FOLDERS for each in self.objects.list(folder)):
            is_over = object.path in over or object.modified + FILE_SECONDS < now
            if is_over and layout.id_of(object.path) not in needed:
                expired.append(object.path)
            elif object.path.startswith(f"{layout.CONTENTS}/"):
                used[layout.folder_of(object.path)] += object.size
        self.objects.delete(expired)
        self.objects.put(layout.USED, orjson.dumps({"at": now, "bytes": used}))

    def _inputs(self) -> set[str]:
        """The files that batches need which have not ended."""
        tenants = {tenant for tenant, _ in self.unfinished()}
        found = (each for tenant in tenants for each in self._records(layout.batches(tenant), BatchRecord))
        return {each.input_file_id for each in found if not each.status.final}

    def _records(self, folder: str, kind: type[R]) -> list[R]:
        versions = {object.path: object.version for object in self.objects.list(folder)}
        return self._known.read(kind, versions, self.objects.find_all)
