"""Lists the adapter directory, with the faults of its adapters that can be found without reading them whole."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch

from loraplex_protos.adapter_names import MAX_PARTS, RULE, is_part, normal, why_not
from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.config import AdapterConfig
from loraplex_shard.lora.peft.headers import read_headers
from loraplex_shard.lora.sources.files import (
    CONFIG,
    GGUF,
    MLX_TENSORS,
    PICKLE,
    TENSORS,
    check_kind,
    check_names,
    check_size,
)
from loraplex_shard.lora.sources.folders import CACHED, cached_id, find_snapshot, is_inside
from loraplex_shard.lora.sources.other_forms import is_other
from loraplex_shard.lora.weights.deltas import Invocation

_TELLING = frozenset({CONFIG, TENSORS, PICKLE, MLX_TENSORS})  # a folder with any of these is an adapter
_OUTSIDE = "it is a link that leads out of the adapter directory"
LOOK_SECONDS = 2.0
FOLDERS_AT_A_TIME = 8
SETTLED_NS = 2 * 10**9  # a folder's modification time is reliable at this age: file system clocks are coarse


@dataclass(frozen=True, slots=True)
class LocalAdapter:
    """An adapter's name in the adapter directory."""

    id: str
    fault: str = ""  # why it cannot be served; empty: no fault was found
    warnings: tuple[str, ...] = ()  # possible problems that do not prevent serving
    invocation: Invocation | None = None  # None: it is always active


class _Found(NamedTuple):
    id: str
    folder: str  # with links resolved
    files: frozenset[str] = frozenset()
    fault: str = ""


class _Scanned(NamedTuple):
    """What an adapter's folder held when it was last scanned."""

    changed: int | None  # its modification time then; None: not reliable
    files: frozenset[str]
    fault: str


class LocalListing:
    """The listing of an adapter directory, if there is one. An adapter is inspected once, and again when its files have
    changed.

    `doubts` returns possible problems of an adapter with a given configuration. `invocation` returns what activates it,
    or raises AdapterInvalidError. So does `check`, for tensors of which only the shapes are known.
    """

    def __init__(
        self,
        root: Path | None,
        doubts: Callable[[AdapterConfig], tuple[str, ...]],
        invocation: Callable[[AdapterConfig], Invocation | None],
        check: Callable[[AdapterConfig, dict[str, torch.Tensor]], None],
    ) -> None:
        self._root = str(root.resolve()) if root is not None else ""
        self._doubts = doubts
        self._invocation = invocation
        self._check = check
        self._lock = Lock()  # guards all of the following
        self._began = 0.0  # when the last listing began
        self._listed: list[LocalAdapter] = []
        self._scanned: dict[str, _Scanned] = {}  # by folder
        self._seen: dict[str, tuple[object, LocalAdapter]] = {}

    def adapters(self) -> list[LocalAdapter]:
        """The adapters, sorted by id. New ones are inspected for a few seconds at most. If there are thousands, the
        others are listed without a fault until a later call."""
        asked = time.monotonic()
        with self._lock:
            if self._began < asked:  # otherwise another thread has listed it meanwhile
                self._began = time.monotonic()
                self._listed = self._list()
            return self._listed

    def count(self) -> int:
        with self._lock:
            return sum(1 for _ in self._found())

    def _list(self) -> list[LocalAdapter]:
        found: dict[str, _Found] = {}
        for adapter in self._found():
            if adapter.id not in found or adapter.folder.endswith(adapter.id):  # the folder that is spelled like its id
                found[adapter.id] = adapter
        deadline = time.monotonic() + LOOK_SECONDS
        listed = [self._look(adapter, deadline) for _, adapter in sorted(found.items())]
        self._seen = {id: seen for id, seen in self._seen.items() if id in found}
        self._scanned = {adapter.folder: self._scanned[adapter.folder] for adapter in found.values() if adapter.files}
        return listed

    def _found(self) -> Iterator[_Found]:
        if not self._root:
            return
        for number, adapter in enumerate(self._walk(self._root, ())):
            if number % FOLDERS_AT_A_TIME == 0:
                _yield()
            yield adapter

    def _walk(self, folder: str, names: tuple[str, ...]) -> Iterator[_Found]:
        try:
            changed = os.stat(folder).st_mtime_ns
            known = self._scanned.get(folder)
            if known is not None and known.changed == changed:
                yield _Found("/".join(names), folder, known.files, known.fault)
                return
            with os.scandir(folder) as scan:
                entries = list(scan)
        except OSError as error:
            if names and isinstance(error, PermissionError):
                yield _Found("/".join(names), folder, fault=f"the folder cannot be read: {error.strerror}")
            return
        files = [entry for entry in entries if entry.name in _TELLING or entry.name.endswith(GGUF)]
        if names and files:
            outside = any(entry.is_symlink() and not self._holds(entry.path) for entry in files)
            fault = f"its files: {_OUTSIDE}" if outside else ""
            held = frozenset(entry.name for entry in files)
            if held.isdisjoint((TENSORS, MLX_TENSORS)):
                held |= {entry.name for entry in entries if is_other(entry.name)}
            settled = time.time_ns() - changed > SETTLED_NS and not outside
            self._scanned[folder] = _Scanned(changed if settled else None, held, fault)
            yield _Found("/".join(names), folder, held, fault)
            return
        for entry in entries:
            with suppress(OSError):  # the folder is gone, or is a link to itself
                yield from self._enter(entry, names)

    def _enter(self, entry: os.DirEntry[str], names: tuple[str, ...]) -> Iterator[_Found]:
        if not entry.is_dir():
            return
        path, part = entry.path, _shown(entry.name)
        id = "/".join((*names, part))
        if entry.is_symlink():
            path = os.path.realpath(path)
            if not self._holds(path):
                yield _Found(id, path, fault=_OUTSIDE)
                return
            if Path(entry.path).is_relative_to(path):  # links in a circle
                return
        snapshot = None if names or not entry.name.startswith(CACHED) else find_snapshot(Path(path))
        if snapshot is not None:
            yield from self._walk(os.path.realpath(snapshot), tuple(cached_id(entry.name).split("/")))
        elif is_part(part) and len(names) < MAX_PARTS:
            yield from self._walk(path, (*names, part))
        elif os.path.isfile(os.path.join(path, CONFIG)):
            reason = why_not(id) if _is_text(entry.name) else f"it is not UTF-8: {RULE}"
            yield _Found(id, path, fault=f"it cannot be asked for by this name: {reason}")

    def _holds(self, path: str) -> bool:
        return is_inside(Path(path), Path(self._root))

    def _look(self, found: _Found, deadline: float) -> LocalAdapter:
        if found.fault:
            return LocalAdapter(found.id, found.fault)
        state, known = _state(found), self._seen.get(found.id)
        if known is not None and known[0] == state:
            return known[1]
        if time.monotonic() > deadline:
            return LocalAdapter(found.id)
        _yield()
        try:
            adapter = self._inspect(found)
        except AdapterInvalidError as error:
            adapter = LocalAdapter(found.id, error.message)
        except OSError as error:
            adapter = LocalAdapter(found.id, f"the files cannot be read: {error.strerror}")
        self._seen[found.id] = state, adapter
        return adapter

    def _inspect(self, found: _Found) -> LocalAdapter:
        paths = {name: Path(found.folder, name) for name in found.files}
        for name in {CONFIG, check_names(found.files)} & paths.keys():
            status = paths[name].stat()
            check_kind(name, status.st_mode)
            check_size(name, status.st_size)
        parsed, shapes = read_headers(paths)
        self._check(parsed, shapes)
        return LocalAdapter(found.id, warnings=self._doubts(parsed), invocation=self._invocation(parsed))


def _yield() -> None:
    """Releases the interpreter's lock for a step that waits for it."""
    time.sleep(1e-4)


def _state(found: _Found) -> object:
    """The state of an adapter's files. If it is the same, the contents are the same as far as `stat` can tell."""
    try:
        statuses = [os.stat(f"{found.folder}/{name}") for name in sorted(found.files)]
    except OSError:
        return None
    return found.files, *((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in statuses)


def _is_text(name: str) -> bool:
    """Whether a folder's name is not just bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _shown(name: str) -> str:
    """The name as printable text: a folder's name may be bytes that are not text."""
    return normal(name.encode(errors="surrogateescape").decode(errors="backslashreplace"))
