"""Everything about adapters that takes a processor's time: reading their files, checking them, and cutting them for
this rank. Which adapters a rank holds is up to `store.py`; this may run in another process (`stager.py`)."""

import sys
from collections.abc import Container, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from loraplex_protos.errors import AdapterSourceError
from loraplex_shard.lora.fetches import check_headers
from loraplex_shard.lora.merge import Recipe, merge
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.reading import check_shapes, cut_adapter, read_adapter, read_deltas
from loraplex_shard.lora.peft.whole import WholeAdapter
from loraplex_shard.lora.sources.files import AdapterFiles
from loraplex_shard.lora.sources.protocol import Origin
from loraplex_shard.lora.weights.deltas import Delta, HostAdapter
from loraplex_shard.shapes.layout import LinearLayout


class AdapterReader:
    """Reads adapters for the linear layers of `layouts`, in `dtype`, of at most `limit` bytes each. Has no state."""

    def __init__(
        self, layouts: Sequence[LinearLayout], dtype: torch.dtype, base: BaseModel, limit: int = sys.maxsize
    ) -> None:
        self.layouts = tuple(layouts)
        self._dtype = dtype
        self._base = base
        self._limit = limit

    def check(self, paths: Mapping[str, Path]) -> None:
        """Raises AdapterInvalidError for what the headers of these files, by name, show to be wrong."""
        check_headers(paths, partial(check_shapes, layouts=self.layouts, base=self._base))

    def read(self, origin: Origin, paths: Mapping[str, Path], known: Container[str]) -> tuple[str, HostAdapter | None]:
        """Reads the files of an origin. Returns the digest, and the adapter; None if its digest is a known one. If
        there are `paths`, the files' headers are checked first, which takes no memory."""
        if paths:
            self.check(paths)
        return self.cut(origin.read(), known)

    def cut(self, files: AdapterFiles, known: Container[str]) -> tuple[str, HostAdapter | None]:
        """The same for files that have been read."""
        digest = files.digest()
        if digest in known:
            return digest, None
        return digest, read_adapter(files, self.layouts, self._base, self._dtype, self._limit)

    def merge(self, parts: Sequence[tuple[str, Origin | AdapterFiles]], recipe: Recipe) -> HostAdapter:
        """Merges adapters, each with its digest. Raises AdapterSourceError for one whose files have changed, and what
        read_deltas and merge raise."""
        merged = merge([self._whole(digest, part) for digest, part in parts], recipe)
        return cut_adapter(WholeAdapter(merged), self.layouts, self._base, self._dtype)

    def _whole(self, digest: str, part: Origin | AdapterFiles) -> dict[str, Delta]:
        """Reads an adapter that was cut before, unpartitioned."""
        try:
            files = part.read() if isinstance(part, Origin) else part
        except AdapterSourceError as error:
            raise AdapterSourceError(f"to merge: {error.message}; load the adapter again") from error
        if files.digest() != digest:
            raise AdapterSourceError("to merge: the adapter's files have changed: load it again")
        return read_deltas(files, self.layouts, self._base)
