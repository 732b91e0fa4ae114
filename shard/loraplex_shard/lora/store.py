"""This rank's adapters: staged in host memory, by digest, and loaded into slots on the device.

The router decides what is staged and loaded. All methods may be called from any thread; none of them waits for a step,
and no step waits for them.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

import torch

from loraplex_protos.errors import (
    AdapterInUseError,
    AdapterInvalidError,
    AdapterNotFoundError,
    OverloadedError,
    quote,
)
from loraplex_shard.device.priority import gently
from loraplex_shard.lora.fetches import Fetches
from loraplex_shard.lora.merge import Recipe
from loraplex_shard.lora.once import Once
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.reader import AdapterReader
from loraplex_shard.lora.room import Room
from loraplex_shard.lora.sources.order import locate, refusal
from loraplex_shard.lora.sources.patience import Progress
from loraplex_shard.lora.sources.protocol import Origin, Source
from loraplex_shard.lora.sources.text_files import AdapterText
from loraplex_shard.lora.stager import Caller, Here, Stager
from loraplex_shard.lora.uploads import NAME, Upload, check_upload, received
from loraplex_shard.lora.weights.deltas import HostAdapter, Invocation
from loraplex_shard.lora.weights.transfer import Transfer
from loraplex_shard.observation.metrics import ShardMetrics
from loraplex_shard.shapes.adapter import AdapterWeights
from loraplex_shard.shapes.classifier import Classes
from loraplex_shard.shapes.layout import LinearLayout

logger = logging.getLogger(__name__)

# The copies of an adapter in memory while it is staged: its file, its tensors in the dtype, and this rank's part of
# them in one piece.
COPIES = 3


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    digest: str  # sha256 over the adapter's files, in hex; for a merged one, the router's name
    source: str  # where it came from; "merged" for a merged one
    revision: str  # the hub commit; empty for other sources
    lora_rank: int  # the largest of its modules
    size_bytes: int  # of this rank's part of it, in host memory
    device_bytes: int  # of the same in a slot
    text: AdapterText = field(default_factory=AdapterText, hash=False)
    warnings: tuple[str, ...] = ()  # possible problems that do not prevent serving
    invocation: Invocation | None = None  # None: it is always active
    classes: Classes | None = None  # of its own classifier
    tokenizer_json: bytes = b""  # with tokens of its own; empty: the model's
    vocab_size: int = 0  # tokens that it has embeddings for; 0: as many as the model


class AdapterStore:
    """Adapters for the linear layers of `layouts`, in `dtype`, in slots on `device`.

    An id is read from the first of `sources` that has it. Loads and evictions are counted in `metrics`. Staged adapters
    take at most `host_bytes`, and those that are being staged at most half of that. One that takes more than
    `device_bytes` in a slot is refused.
    """

    def __init__(
        self,
        layouts: Sequence[LinearLayout],
        dtype: torch.dtype,
        device: torch.device,
        base: BaseModel,
        sources: Sequence[Source],
        metrics: ShardMetrics | None = None,
        host_bytes: int = sys.maxsize,
        device_bytes: int = sys.maxsize,
    ) -> None:
        self._reader = AdapterReader(layouts, dtype, base, host_bytes)
        self._sources = tuple(sources)
        self._stager: Stager | None = None
        self._transfer = Transfer(device)
        self._host_bytes = host_bytes
        self._device_bytes = device_bytes
        self._room = Room(host_bytes // 2)
        self._fetches = Fetches()
        self._metrics = metrics or ShardMetrics()
        self._once, self._fetching = Once(), Once()
        self._lock = Lock()  # guards the three below; held only for look-ups
        self._digests: dict[Origin, str] = {}  # of adapters that have been read
        self._host: dict[str, HostAdapter] = {}  # by digest
        self._slots: dict[int, tuple[str, AdapterWeights]] = {}

    def read_apart(self, on_lost: Callable[[], None] = lambda: None) -> Stager:
        """From now on, a stager fetches and reads adapters, not the calling thread. Call it while no other thread uses
        the store, and close the stager at the end. `on_lost`: see Stager."""
        shared = {"reader": self._reader, **{source.name: source for source in self._sources}}
        self._stager = Stager(shared, on_lost)
        return self._stager

    def stage(self, id: str, source: str, revision: str, token: str) -> StagedAdapter:
        """Fetches an adapter, checks it, and keeps this rank's part in host memory.

        Unchanged files of a staged adapter are not read again; concurrent calls for the same files do the work once. A
        changed adapter gets a new digest and leaves the old one staged. Raises AdapterNotFoundError,
        AdapterForbiddenError, AdapterSourceError or AdapterInvalidError; OverloadedError if there is no room until
        others are unstaged.
        """
        read = False
        with self._fetches.started(id, source, revision) as progress, self._process() as process:
            origin = process.call(locate, self._sources, id, source, revision, token, progress.take)
            while (staged := self._staged(origin)) is None:
                self._once.do(origin, lambda: self._read(process, origin, progress))
                read = True
        for warning in staged.warnings if read else ():
            logger.warning("adapter %s: %s", quote(id), warning)
        return staged

    def refusal(self, id: str, source: str) -> str:
        """Why no source can have an adapter, as far as it is known without asking over the network; empty: one may."""
        return refusal(self._sources, id, source)

    def fetch(self, id: str, source: str, revision: str) -> Origin:
        """Brings an adapter's files to this machine's disk, and checks their headers, so that a later `stage` fetches
        nothing. Raises the same errors."""
        with self._fetches.started(id, source, revision) as progress, self._process() as process:
            origin = process.call(locate, self._sources, id, source, revision, "", progress.take)
            self._fetch(process, origin, progress)
            process.compute(self._reader.check, origin)
        return origin

    def fetches(self) -> list[Progress]:
        """The fetches that `stage` and `fetch` are busy with, one per id, source and revision."""
        return self._fetches.current()

    def stage_upload(self, sizes: Mapping[str, int], data: Iterator[bytes]) -> StagedAdapter:
        """The same for files that are sent: their sizes by name, in the order in which `data` has their contents."""
        check_upload(sizes)
        room = self._room.taken(sum(sizes.values()) * COPIES)
        with room, received({"": sizes}, data) as uploads, self._process() as process:
            digest = self._cut(process, uploads[""])
        with self._lock:
            adapter = self._host.get(digest)
        if adapter is None:
            raise OverloadedError("the adapter was unstaged meanwhile: try again")
        return self._describe(digest, NAME, "", adapter)

    def merge(self, digest: str, parts: Sequence[str], recipe: Recipe) -> StagedAdapter:
        """Merges staged adapters, named by their digests, into one that is staged under `digest`, unless it is already.

        The parts' files are read again, because pruning ranks the values of whole tensors, but only this rank's slices
        are staged. Raises AdapterNotFoundError for a part that is not staged, AdapterSourceError for one whose files
        have changed, InvalidRequestError for unequal lora_ranks.
        """
        return self.merge_uploads(digest, parts, recipe, {}, iter(()))

    def merge_uploads(
        self,
        digest: str,
        parts: Sequence[str],
        recipe: Recipe,
        sizes: Mapping[str, Mapping[str, int]],
        data: Iterator[bytes],
    ) -> StagedAdapter:
        """The same if files of some parts, of which only the staged weights were kept, are sent again: their sizes by
        digest and name."""
        for files in sizes.values():
            check_upload(files)
        size = sum(sum(files.values()) for files in sizes.values())
        with self._lock:
            size += COPIES * sum(self._host[part].size_bytes for part in parts if part in self._host)
        with self._room.taken(size), received(sizes, data) as sent:
            self._once.do(digest, lambda: self._make(digest, lambda: self._merged(parts, recipe, sent)))
        with self._lock:
            adapter = self._host[digest]
        return self._describe(digest, "merged", "", adapter)

    def load(self, digest: str, slot: int) -> None:
        """Makes a staged adapter available in a slot (from 1). On the CPU, slots share the host memory.

        Raises AdapterNotFoundError if it is not staged, AdapterInUseError if the slot holds another adapter.
        """
        assert slot >= 1
        with self._lock:
            adapter = self._host.get(digest)
        if adapter is None:
            raise AdapterNotFoundError(f"no adapter with digest {digest[:64]!r} is staged")
        with self._metrics.loading("device"):
            weights = self._transfer.to_device(adapter.weights)
        with self._lock:
            occupant, _ = self._slots.setdefault(slot, (digest, weights))
        if occupant != digest:
            raise AdapterInUseError(f"slot {slot} holds another adapter: unload it first")

    def unload(self, slot: int) -> None:
        """Frees a slot. No plan in flight may use it. Does nothing if the slot is empty."""
        with self._lock:
            found = self._slots.pop(slot, None)
        if found is not None:
            self._metrics.evicted("device")

    def unstage(self, digest: str) -> None:
        """Forgets a staged adapter. Does nothing if it is not staged; raises AdapterInUseError if it is in a slot."""
        with self._lock:
            if any(occupant == digest for occupant, _ in self._slots.values()):
                raise AdapterInUseError(f"the adapter with digest {digest[:64]!r} is in a slot: unload it first")
            found = self._host.pop(digest, None)
            self._digests = {origin: known for origin, known in self._digests.items() if known != digest}
        if found is not None:
            self._metrics.evicted("host")
            held = [found]
            del found
            gently(held.clear)  # its pages go back, if nothing else uses them

    def clear(self) -> None:
        """Forgets all adapters and empties all slots. No plan in flight may use them."""
        with self._lock:
            self._slots.clear()
            self._host.clear()
            self._digests.clear()

    def count(self) -> dict[str, int]:
        """The number of adapters by tier."""
        with self._lock:
            return {"host": len(self._host), "device": len(self._slots)}

    def count_bytes(self) -> dict[str, int]:
        """What adapters take, by tier; on the CPU, slots share the host's."""
        with self._lock:
            in_slots = [self._transfer.bytes_on_device(weights) for _, weights in self._slots.values()]
            return {"host": self._held_bytes(), "device": sum(in_slots)}

    def vocabulary(self, digest: str) -> tuple[bytes, int, tuple[int, ...]] | None:
        """A staged adapter's own tokenizer.json (empty: the model's), how many tokens it has (0: as many as the model),
        and its end tokens. None: it is not staged."""
        with self._lock:
            adapter = self._host.get(digest)
        return None if adapter is None else (adapter.tokenizer_json, adapter.vocab_size, adapter.text.end_token_ids)

    def adapter_in(self, slot: int) -> AdapterWeights:
        """The adapter in a slot; KeyError if it is empty."""
        return self._slots[slot][1]

    def _staged(self, origin: Origin) -> StagedAdapter | None:
        with self._lock:
            digest = self._digests.get(origin)
            adapter = self._host.get(digest) if digest is not None else None
        if digest is None or adapter is None:
            return None
        return self._describe(digest, origin.source.name, origin.revision, adapter)

    @contextmanager
    def _process(self) -> Iterator[Caller]:
        """A context in which calls of the reader and the sources can be made, where that may be done."""
        if self._stager is None:
            yield Here()
        else:
            with self._stager.process() as process:
                yield process

    def _fetch(self, process: Caller, origin: Origin, progress: Progress) -> int:
        """Returns how many bytes the adapter may have at most."""
        return self._fetching.do(origin, lambda: process.call(self._reader.fetch, origin, progress.take))

    def _read(self, process: Caller, origin: Origin, progress: Progress) -> None:
        with self._metrics.loading("disk"):
            size = self._fetch(process, origin, progress)
        with self._room.taken(size * COPIES):
            digest = self._cut(process, origin)
        with self._lock:
            self._digests[origin] = digest

    def _cut(self, process: Caller, files: Origin | Upload) -> str:
        """Holds what is read, unless it is held already. Returns the digest."""
        began = time.monotonic()
        with self._metrics.loading("host"):
            digest, adapter = process.compute(self._reader.read, files, self._is_held)
        if adapter is not None:
            self._hold(digest, adapter, time.monotonic() - began)
        return digest

    def _is_held(self, digest: str) -> bool:
        with self._lock:
            return digest in self._host

    def _merged(self, parts: Sequence[str], recipe: Recipe, sent: Mapping[str, Upload]) -> HostAdapter:
        found = [(part, sent[part] if part in sent else self._origin_of(part)) for part in parts]
        with self._process() as process:
            return process.compute(self._reader.merge, found, recipe)

    def _origin_of(self, digest: str) -> Origin:
        with self._lock:
            origin = next((origin for origin, known in self._digests.items() if known == digest), None)
        if origin is None:
            raise AdapterNotFoundError(f"no adapter with digest {digest[:64]!r} is staged")
        return origin

    def _make(self, digest: str, make: Callable[[], HostAdapter]) -> None:
        with self._lock:
            if digest in self._host:
                return
        began = time.monotonic()
        with self._metrics.loading("host"):
            adapter = make()
        self._hold(digest, adapter, time.monotonic() - began)

    def _hold(self, digest: str, adapter: HostAdapter, seconds: float) -> None:
        size = adapter.size_bytes
        with self._lock:
            if digest in self._host:
                return  # read from another place at the same time
            self._check_room(size, self._transfer.bytes_on_device(adapter.weights))
            self._host[digest] = adapter
        took = round(seconds * 1e3, 1)
        fields = {"digest": digest, "lora_rank": adapter.lora_rank, "bytes": size, "duration_ms": took}
        logger.info("adapter staged", extra={"fields": fields})

    def _check_room(self, size: int, on_device: int) -> None:
        """Raises OverloadedError if there is not enough room. A process that exceeds its container's memory limit would
        be killed."""
        if size > self._host_bytes:
            raise AdapterInvalidError(
                f"the adapter takes {size:,} bytes of host memory, but all adapters together may take "
                f"{self._host_bytes:,}: give the shards more memory"
            )
        if on_device > self._device_bytes:
            raise AdapterInvalidError(
                f"the adapter takes {on_device:,} bytes of the device's memory, but all adapters in slots together may "
                f"take {self._device_bytes:,}: raise adapter_memory_gib"
            )
        free = self._host_bytes - self._held_bytes()
        if size > free:
            raise OverloadedError(
                f"the adapter needs {size:,} bytes of host memory, but only {free:,} are free: try again later"
            )

    def _held_bytes(self) -> int:
        return sum(adapter.size_bytes for adapter in self._host.values())

    def _describe(self, digest: str, source: str, revision: str, adapter: HostAdapter) -> StagedAdapter:
        return StagedAdapter(
            digest,
            source,
            revision,
            adapter.lora_rank,
            adapter.size_bytes,
            self._transfer.bytes_on_device(adapter.weights),
            adapter.text,
            adapter.warnings,
            adapter.invocation,
            None if adapter.weights.classifier is None else adapter.weights.classifier.classes,
            adapter.tokenizer_json,
            adapter.vocab_size,
        )
