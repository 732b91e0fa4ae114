"""This rank's adapters: staged in host memory, by digest, and loaded into slots on the device.

The router decides what is staged and loaded. All methods may be called from any thread; none of them waits for a step,
and no step waits for them.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from loraplex_protos.errors import AdapterNotFoundError, OverloadedError, quote
from loraplex_shard.device.priority import gently
from loraplex_shard.lora.epoch import Epoch, OnLeave
from loraplex_shard.lora.fetches import Fetches
from loraplex_shard.lora.merge import Recipe
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


def _stays(end: Callable[[], None]) -> bool:
    """The client of a call that does not leave."""
    return True


class AdapterStore:
    """Adapters for the linear layers of `layouts`, in `dtype`, in slots on `device`.

    An id is read from the first of `sources` that has it. Loads and evictions are counted in `metrics`. Staged adapters
    take at most `host_bytes`, and those that are being staged at most half of that. One that takes more than
    `device_bytes` in a slot is refused.

    What calls have begun ends with `clear`, or once `on_leave` tells them that their client has left: they raise
    UnavailableError.
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
        self._room = Room(host_bytes // 2)
        self._fetches = Fetches()
        self._metrics = metrics or ShardMetrics()
        self._new_epoch = partial(Epoch, self._transfer, host_bytes, device_bytes)
        self._epoch = self._new_epoch()

    def read_apart(self, on_lost: Callable[[], None] = lambda: None) -> Stager:
        """From now on, a stager fetches and reads adapters, not the calling thread. Call it while no other thread uses
        the store, and close the stager at the end. `on_lost`: see Stager."""
        shared = {"reader": self._reader, **{source.name: source for source in self._sources}}
        self._stager = Stager(shared, on_lost)
        return self._stager

    def stage(self, id: str, source: str, revision: str, token: str, on_leave: OnLeave = _stays) -> StagedAdapter:
        """Fetches an adapter, checks it, and keeps this rank's part in host memory.

        Unchanged files of a staged adapter are not read again; concurrent calls for the same files do the work once. A
        changed adapter gets a new digest and leaves the old one staged. Raises AdapterNotFoundError,
        AdapterForbiddenError, AdapterSourceError or AdapterInvalidError; OverloadedError if there is no room until
        others are unstaged.
        """
        epoch, read = self._epoch, False
        with self._fetches.started(id, source, revision) as progress, self._process(epoch, on_leave) as process:
            origin = process.call(locate, self._sources, id, source, revision, token, progress.take)
            while (found := epoch.read_from(origin)) is None:
                epoch.once.do(origin, lambda: self._read(epoch, process, origin, progress))
                read = True
        digest, adapter = found
        staged = self._describe(digest, origin.source.name, origin.revision, adapter)
        for warning in staged.warnings if read else ():
            logger.warning("adapter %s: %s", quote(id), warning)
        return staged

    def refusal(self, id: str, source: str) -> str:
        """Why no source can have an adapter, as far as it is known without asking over the network; empty: one may."""
        return refusal(self._sources, id, source)

    def fetch(self, id: str, source: str, revision: str, on_leave: OnLeave = _stays) -> Origin:
        """Brings an adapter's files to this machine's disk, and checks their headers, so that a later `stage` fetches
        nothing. Raises the same errors."""
        epoch = self._epoch
        with self._fetches.started(id, source, revision) as progress, self._process(epoch, on_leave) as process:
            origin = process.call(locate, self._sources, id, source, revision, "", progress.take)
            self._fetch(epoch, process, origin, progress)
            process.compute(self._reader.check, origin)
        return origin

    def fetches(self) -> list[Progress]:
        """The fetches that `stage` and `fetch` are busy with, one per id, source and revision."""
        return self._fetches.current()

    def stage_upload(
        self, sizes: Mapping[str, int], data: Iterator[bytes], on_leave: OnLeave = _stays
    ) -> StagedAdapter:
        """The same for files that are sent: their sizes by name, in the order in which `data` has their contents."""
        epoch = self._epoch
        check_upload(sizes)
        room = self._room.taken(sum(sizes.values()) * COPIES)
        with room, received({"": sizes}, data) as uploads, self._process(epoch, on_leave) as process:
            digest = self._cut(epoch, process, uploads[""])
        return self._describe(digest, NAME, "", _still_there(epoch.get(digest)))

    def merge(self, digest: str, parts: Sequence[str], recipe: Recipe, on_leave: OnLeave = _stays) -> StagedAdapter:
        """Merges staged adapters, named by their digests, into one that is staged under `digest`, unless it is already.

        The parts' files are read again, because pruning ranks the values of whole tensors, but only this rank's slices
        are staged. Raises AdapterNotFoundError for a part that is not staged, AdapterSourceError for one whose files
        have changed, InvalidRequestError for unequal lora_ranks.
        """
        return self.merge_uploads(digest, parts, recipe, {}, iter(()), on_leave)

    def merge_uploads(
        self,
        digest: str,
        parts: Sequence[str],
        recipe: Recipe,
        sizes: Mapping[str, Mapping[str, int]],
        data: Iterator[bytes],
        on_leave: OnLeave = _stays,
    ) -> StagedAdapter:
        """The same if files of some parts, of which only the staged weights were kept, are sent again: their sizes by
        digest and name."""
        epoch = self._epoch
        for files in sizes.values():
            check_upload(files)
        size = sum(sum(files.values()) for files in sizes.values())
        size += COPIES * sum(part.size_bytes for part in map(epoch.get, parts) if part is not None)
        with self._room.taken(size), received(sizes, data) as sent:
            epoch.once.do(digest, lambda: self._merge(epoch, on_leave, digest, parts, recipe, sent))
        return self._describe(digest, "merged", "", _still_there(epoch.get(digest)))

    def load(self, digest: str, slot: int) -> None:
        """Makes a staged adapter available in a slot (from 1). On the CPU, slots share the host memory.

        Raises AdapterNotFoundError if it is not staged, AdapterInUseError if the slot holds another adapter.
        """
        assert slot >= 1
        epoch = self._epoch
        if (adapter := epoch.get(digest)) is None:
            raise AdapterNotFoundError(f"no adapter with digest {digest[:64]!r} is staged")
        with self._metrics.loading("device"):
            weights = self._transfer.to_device(adapter.weights)
        epoch.fill(slot, digest, weights)

    def unload(self, slot: int) -> None:
        """Frees a slot. No plan in flight may use it. Does nothing if the slot is empty."""
        if self._epoch.empty(slot):
            self._metrics.evicted("device")

    def unstage(self, digest: str) -> None:
        """Forgets a staged adapter. Does nothing if it is not staged; raises AdapterInUseError if it is in a slot."""
        found = self._epoch.drop(digest)
        if found is not None:
            self._metrics.evicted("host")
            held = [found]
            del found
            gently(held.clear)  # its pages go back, if nothing else uses them

    def clear(self) -> None:
        """Begins a new epoch: without adapters, and nothing that was begun before comes into it. No plan in flight may
        use them."""
        ended, self._epoch = self._epoch, self._new_epoch()
        ended.end()

    def count(self) -> dict[str, int]:
        """The number of adapters by tier."""
        return self._epoch.count()

    def count_bytes(self) -> dict[str, int]:
        """What adapters take, by tier; on the CPU, slots share the host's."""
        return self._epoch.count_bytes()

    def vocabulary(self, digest: str) -> tuple[bytes, int, tuple[int, ...]] | None:
        """A staged adapter's own tokenizer.json (empty: the model's), how many tokens it has (0: as many as the model),
        and its end tokens. None: it is not staged."""
        adapter = self._epoch.get(digest)
        return None if adapter is None else (adapter.tokenizer_json, adapter.vocab_size, adapter.text.end_token_ids)

    def adapter_in(self, slot: int) -> AdapterWeights:
        """The adapter in a slot; KeyError if it is empty."""
        return self._epoch.in_slot(slot)

    @contextmanager
    def _process(self, epoch: Epoch, on_leave: OnLeave) -> Iterator[Caller]:
        """A context in which calls of the reader and the sources can be made, where that may be done, as long as their
        answers are wanted."""
        begun = nullcontext(Here()) if self._stager is None else self._stager.process()
        with begun as process, epoch.working(process, on_leave):
            yield process

    def _fetch(self, epoch: Epoch, process: Caller, origin: Origin, progress: Progress) -> int:
        """Returns how many bytes the adapter may have at most."""
        return epoch.fetching.do(origin, lambda: process.call(self._reader.fetch, origin, progress.take))

    def _read(self, epoch: Epoch, process: Caller, origin: Origin, progress: Progress) -> None:
        with self._metrics.loading("disk"):
            size = self._fetch(epoch, process, origin, progress)
        with self._room.taken(size * COPIES):
            digest = self._cut(epoch, process, origin)
        epoch.remember(origin, digest)

    def _cut(self, epoch: Epoch, process: Caller, files: Origin | Upload) -> str:
        """Holds what is read, unless it is held already. Returns the digest."""
        began = time.monotonic()
        with self._metrics.loading("host"):
            digest, adapter = process.compute(self._reader.read, files, epoch.is_held)
        if adapter is not None and epoch.hold(digest, adapter):
            _log_staged(digest, adapter, began)
        return digest

    def _merge(
        self,
        epoch: Epoch,
        on_leave: OnLeave,
        digest: str,
        parts: Sequence[str],
        recipe: Recipe,
        sent: Mapping[str, Upload],
    ) -> None:
        if epoch.is_held(digest):
            return
        began = time.monotonic()
        found = [(part, sent[part] if part in sent else epoch.origin_of(part)) for part in parts]
        with self._metrics.loading("host"), self._process(epoch, on_leave) as process:
            adapter = process.compute(self._reader.merge, found, recipe)
        if epoch.hold(digest, adapter):
            _log_staged(digest, adapter, began)

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


def _still_there(adapter: HostAdapter | None) -> HostAdapter:
    if adapter is None:
        raise OverloadedError("the adapter was unstaged meanwhile: try again")
    return adapter


def _log_staged(digest: str, adapter: HostAdapter, began: float) -> None:
    took = round((time.monotonic() - began) * 1e3, 1)
    fields = {
        "digest": digest,
        "lora_rank": adapter.lora_rank,
        "bytes": adapter.size_bytes,
        "duration_ms": took,
    }
    logger.info("adapter staged", extra={"fields": fields})
