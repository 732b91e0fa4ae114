"""Adapters in the operator's directory: an id is a name under it, and never leads out of it."""

import os
from dataclasses import dataclass
from pathlib import Path

from loraplex_protos.errors import AdapterNotFoundError, AdapterSourceError, quote
from loraplex_shard.lora.sources.files import CONFIG, TENSORS, AdapterFiles, check_names, read_files
from loraplex_shard.lora.sources.folders import find_folder, is_inside
from loraplex_shard.lora.sources.text_files import NAMED_TEMPLATES, text_files

Fingerprint = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class LocalOrigin:
    """One state of one adapter's files. Equal origins have equal contents, as far as `stat` can tell."""

    paths: tuple[tuple[str, Path], ...]  # of the files by name
    fingerprint: Fingerprint

    @property
    def source(self) -> str:
        return "local"

    @property
    def revision(self) -> str:
        return ""

    def fetch(self) -> int:
        try:
            return sum(path.stat().st_size for _, path in self.paths)
        except OSError as error:
            raise AdapterSourceError(f"the adapter's files cannot be read: {error.strerror}") from error

    def read(self) -> AdapterFiles:
        try:
            files = read_files(dict(self.paths))
            unchanged = _fingerprint(self.paths) == self.fingerprint
        except OSError as error:
            raise AdapterSourceError(f"the adapter's files cannot be read: {error.strerror}") from error
        if not unchanged:
            raise AdapterSourceError("the adapter's files changed while they were read: try again")
        return files


class LocalSource:
    """The adapters under a directory."""

    def __init__(self, directory: Path) -> None:
        self.root = directory.resolve()

    def has(self, id: str) -> bool:
        """Whether the id names something in the directory, be it a sound adapter or not."""
        return find_folder(self.root, id) is not None

    def locate(self, id: str) -> LocalOrigin:
        """Raises AdapterNotFoundError if the directory has no such name, AdapterInvalidError if files are missing."""
        directory = find_folder(self.root, id)
        if directory is None:
            raise AdapterNotFoundError(f"the adapter directory has no {quote(id)}")
        try:
            names = self._names(directory)
            check_names(names)
            found = {name: self._resolve(directory / name) for name in (CONFIG, TENSORS, *text_files(names))}
            paths = tuple((name, path) for name, path in found.items() if path is not None)
            if len(paths) < len(found):
                raise AdapterSourceError(f"the files of {quote(id)} are being written: try again")
            return LocalOrigin(paths, _fingerprint(paths))
        except OSError as error:
            raise AdapterSourceError(f"the files of {quote(id)} cannot be read: {error.strerror}") from error

    def _names(self, directory: Path) -> frozenset[str]:
        """Of an adapter's files."""
        names = [name for name in os.listdir(directory) if self._resolve(directory / name)]
        if NAMED_TEMPLATES in names and (directory / NAMED_TEMPLATES).is_dir():
            more = (f"{NAMED_TEMPLATES}/{name}" for name in os.listdir(directory / NAMED_TEMPLATES))
            names += [name for name in more if self._resolve(directory / name)]
        return frozenset(names)

    def _resolve(self, path: Path) -> Path | None:
        """Where the path leads, links followed; None if that does not exist or is outside of the directory."""
        return path.resolve() if is_inside(path, self.root) else None


def _fingerprint(paths: tuple[tuple[str, Path], ...]) -> Fingerprint:
    statuses = (os.stat(path) for _, path in paths)
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in statuses)
