"""Adapters in the operator's directory: an id is a name under it, and never leads out of it."""

import os
from dataclasses import dataclass
from pathlib import Path

from loraplex_protos.errors import AdapterNotFoundError, AdapterSourceError, quote
from loraplex_shard.lora.chat_template import TEMPLATE_FILES
from loraplex_shard.lora.files import CONFIG, TENSORS, AdapterFiles, check_names, read_files
from loraplex_shard.lora.folders import find_folder, is_inside

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
        config, tensors = (self._resolve(directory / name) for name in (CONFIG, TENSORS))
        try:
            if config is None or tensors is None:
                check_names(frozenset(name for name in os.listdir(directory) if self._resolve(directory / name)))
                raise AdapterSourceError(f"the files of {quote(id)} are being written: try again")
            template = self._find_template(directory)
            return LocalOrigin(config, tensors, template, _fingerprint(config, tensors, template))
        except OSError as error:
            raise AdapterSourceError(f"the files of {quote(id)} cannot be read: {error.strerror}") from error

    def _find_template(self, directory: Path) -> tuple[str, Path] | None:
        found = ((name, self._resolve(directory / name)) for name in TEMPLATE_FILES)
        return next(((name, path) for name, path in found if path is not None), None)

    def _resolve(self, path: Path) -> Path | None:
        """Where the path leads, links followed; None if that does not exist or is outside of the directory."""
        return path.resolve() if is_inside(path, self.root) else None


def _fingerprint(config: Path, tensors: Path, template: tuple[str, Path] | None) -> Fingerprint:
    statuses = (os.stat(path) for path in (config, tensors, *(template or ())[1:]))
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in statuses)
