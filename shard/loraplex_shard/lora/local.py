"""Adapters in the operator's directory: an id is a name under it, and never leads out of it."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loraplex_protos.errors import AdapterNotFoundError, AdapterSourceError, quote
from loraplex_shard.lora.chat_template import TEMPLATE_FILES
from loraplex_shard.lora.files import CONFIG, TENSORS, AdapterFiles, check_names, read_files

_COMPONENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,95}")
_MAX_COMPONENTS = 4

Fingerprint = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class LocalOrigin:
    """One state of one adapter's files. Equal origins have equal contents, as far as `stat` can tell."""

    config: Path
    tensors: Path
    template: tuple[str, Path] | None  # the file that may hold a chat template: its name, and where it is
    fingerprint: Fingerprint

    @property
    def source(self) -> str:
        return "local"

    @property
    def revision(self) -> str:
        return ""

    def read(self) -> AdapterFiles:
        try:
            files = read_files(self.config, self.tensors, self.template)
            unchanged = _fingerprint(self.config, self.tensors, self.template) == self.fingerprint
        except OSError as error:
            raise AdapterSourceError(f"the adapter's files cannot be read: {error.strerror}") from error
        if not unchanged:
            raise AdapterSourceError("the adapter's files changed while they were read: try again")
        return files


@dataclass(frozen=True, slots=True)
class LocalAdapter:
    """A name in the adapter directory."""

    id: str
    fault: str = ""  # why it cannot be served; empty: nothing is wrong as far as can be seen
    warnings: tuple[str, ...] = ()  # what may be wrong with it though it can be served


def is_id(id: str) -> bool:
    """Whether the id can name a folder: it leads nowhere else."""
    names = id.split("/")
    return len(names) <= _MAX_COMPONENTS and all(_COMPONENT.fullmatch(name) for name in names)


class LocalSource:
    """The adapters under a directory."""

    def __init__(self, directory: Path) -> None:
        self._root = directory.resolve()

    def has(self, id: str) -> bool:
        """Whether the id names something in the directory, be it a sound adapter or not."""
        return self._find(id) is not None

    def locate(self, id: str) -> LocalOrigin:
        """Raises AdapterNotFoundError if the directory has no such name, AdapterInvalidError if files are missing."""
        directory = self._find(id)
        if directory is None:
            raise AdapterNotFoundError(f"the adapter directory has no {quote(id)}")
        config, tensors = (self._resolve(directory / name) for name in (CONFIG, TENSORS))
        try:
            if config is None or tensors is None:
                check_names(frozenset(name for name in os.listdir(directory) if self._resolve(directory / name)))
                raise AdapterSourceError(f"the files of {quote(id)} are being written: try again")
            template = self._find_template(directory)
            return LocalOrigin(config, tensors, template, _fingerprint(config, tensors, template))
        except OSError as error:
            raise AdapterSourceError(f"the files of {quote(id)} cannot be read: {error.strerror}") from error

    def adapters(self) -> list[LocalAdapter]:
        """The directories that hold an adapter's config, sorted by their ids."""
        return [LocalAdapter(id) for id in sorted("/".join(names) for names in self._walk(()))]

    def _walk(self, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        directory = self._root.joinpath(*names)
        if names and (directory / CONFIG).is_file():
            yield names
        elif len(names) < _MAX_COMPONENTS:
            for name in _listed(directory):
                if _COMPONENT.fullmatch(name) and self._resolve(directory / name):
                    yield from self._walk((*names, name))

    def _find(self, id: str) -> Path | None:
        if not is_id(id):
            return None
        directory = self._resolve(self._root.joinpath(*id.split("/")))
        return directory if directory is not None and directory.is_dir() else None

    def _find_template(self, directory: Path) -> tuple[str, Path] | None:
        found = ((name, self._resolve(directory / name)) for name in TEMPLATE_FILES)
        return next(((name, path) for name, path in found if path is not None), None)

    def _resolve(self, path: Path) -> Path | None:
        """Where the path leads, links followed; None if that does not exist or is outside of the directory."""
        try:
            resolved = path.resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: links in a circle
            return None
        return resolved if resolved.is_relative_to(self._root) else None


def _listed(directory: Path) -> list[str]:
    """The names in a directory; none if it is something else, or gone, or closed to us."""
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _fingerprint(config: Path, tensors: Path, template: tuple[str, Path] | None) -> Fingerprint:
    statuses = (os.stat(path) for path in (config, tensors, *(template or ())[1:]))
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in statuses)
