"""Everything about adapters that takes a processor's time: bringing their files to disk, reading them, checking them,
and cutting them for this rank. Which adapters a rank holds is up to `store.py`; this may run in another process
(`stager.py`)."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from loraplex_protos.errors import AdapterSourceError
from loraplex_shard.lora.merge import Recipe, merge
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.headers import read_headers
from loraplex_shard.lora.peft.parsing import config_in
from loraplex_shard.lora.peft.products import most_bytes
from loraplex_shard.lora.peft.reading import check_shapes, cut_adapter, read_adapter, read_deltas
from loraplex_shard.lora.peft.whole import WholeAdapter
from loraplex_shard.lora.sources.patience import Progress, Report
from loraplex_shard.lora.sources.protocol import Origin
from loraplex_shard.lora.uploads import Upload
from loraplex_shard.lora.weights.deltas import Delta, HostAdapter
from loraplex_shard.shapes.layout import LinearLayout

# Bytes of files whose headers are checked before anything else is read.
LARGE = 64 << 20


class AdapterReader:
    """Reads adapters for the linear layers of `layouts`, in `dtype`, of at most `limit` bytes each. Has no state."""

    def __init__(
        self, layouts: Sequence[LinearLayout], dtype: torch.dtype, base: BaseModel, limit: int = sys.maxsize
    ) -> None:
        self._layouts = tuple(layouts)
        self._dtype = dtype
        self._base = base
        self._limit = limit

    def fetch(self, origin: Origin, report: Report) -> int:
        """Brings the files to this machine's disk, unless they are there. Returns how many bytes the adapter may have
        at most, in its files and as LoRA. Raises the AdapterErrors of the source."""
        paths = _fetch(origin, report)
        config = config_in(paths)
        return _size(paths) + (0 if config is None else most_bytes(config, self._layouts))

    def check(self, origin: Origin) -> None:
        """Raises AdapterInvalidError for what the headers of fetched files show to be wrong."""
        self._check(_fetch(origin))

    def read(self, files: Origin | Upload, is_known: Callable[[str], bool]) -> tuple[str, HostAdapter | None]:
        """Reads fetched or uploaded files. Returns the digest, and the adapter; None if its digest is known. The
        headers of large files are checked first, which takes no memory."""
        if isinstance(files, Origin) and _size(paths := _fetch(files)) > LARGE:
            self._check(paths)
        contents = files.read()
        digest = contents.digest()
        if is_known(digest):
            return digest, None
        return digest, read_adapter(contents, self._layouts, self._base, self._dtype, self._limit)

    def merge(self, parts: Sequence[tuple[str, Origin | Upload]], recipe: Recipe) -> HostAdapter:
        """Merges adapters, each with its digest. Raises AdapterSourceError for one whose files have changed, and what
        read_deltas and merge raise."""
        merged = merge([self._whole(digest, part) for digest, part in parts], recipe)
        return cut_adapter(WholeAdapter(merged), self._layouts, self._base, self._dtype)

    def _check(self, paths: Mapping[str, Path]) -> None:
        try:
            config, shapes = read_headers(paths)
        except OSError as error:
            raise AdapterSourceError(f"the adapter's files cannot be read: {error.strerror}: try again") from error
        check_shapes(config, shapes, self._layouts, self._base)

    def _whole(self, digest: str, part: Origin | Upload) -> dict[str, Delta]:
        """Reads an adapter that was cut before, unpartitioned."""
        try:
            files = part.read()
        except AdapterSourceError as error:
            raise AdapterSourceError(f"to merge: {error.message}; load the adapter again") from error
        if files.digest() != digest:
            raise AdapterSourceError("to merge: the adapter's files have changed: load it again")
        return read_deltas(files, self._layouts, self._base)


def _fetch(origin: Origin, report: Report = lambda done, total, trouble: None) -> dict[str, Path]:
    progress = Progress(origin.id, report=report)
    paths = origin.fetch(progress)
    report(progress.done, progress.total, "")
    return paths


def _size(paths: Mapping[str, Path]) -> int:
    """The hub does not always say a file's size."""
    try:
        return sum(path.stat().st_size for path in paths.values())
    except OSError as error:
        raise AdapterSourceError(f"the adapter's files cannot be read: {error.strerror}: try again") from error
