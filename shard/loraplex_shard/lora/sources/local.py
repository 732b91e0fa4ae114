"""Adapters in the operator's directory. An id is a path below the directory and never leads out of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from loraplex_protos.errors import AdapterNotFoundError, AdapterSourceError, quote
from loraplex_shard.lora.sources.files import CONFIG, GGUF, MLX_TENSORS, TENSORS, check_kind, is_telling, read_file
from loraplex_shard.lora.sources.folders import find_folder, is_inside
from loraplex_shard.lora.sources.patience import Progress
from loraplex_shard.lora.sources.protocol import File, Origin, Source
from loraplex_shard.lora.sources.text_files import NAMED_TEMPLATES

MOST_BELOW = 1000  # files in folders below one that is not an adapter, which are looked at to say why


class LocalSource(Source):
    """The adapters under a directory."""

    name = "local"
    remote = False

    def __init__(self, directory: Path) -> None:
        self._root = directory.resolve()

    def refusal(self, id: str) -> str:
        """Empty if there is such a folder, even if its adapter is faulty."""
        return "" if self._find(id) is not None else f"the adapter directory has no {quote(id)}"

    def locate(self, id: str, revision: str, token: str) -> Origin:
        directory = self._find(id)
        if directory is None:
            raise AdapterNotFoundError(self.refusal(id))
        if revision:
            raise AdapterNotFoundError(
                f"{quote(id)} is in the adapter directory, which has no revisions: omit the revision"
            )
        with _typed_errors(id):
            origin = Origin.of(self, id, {name: _state(path) for name, path in self._files(directory)})
            for name, file in origin.files:
                check_kind(name, os.stat(file.place).st_mode)
        return origin

    def fetch(self, origin: Origin, progress: Progress) -> dict[str, Path]:
        progress.reach(progress.total)
        return {name: Path(file.place) for name, file in origin.files}

    def read(self, origin: Origin) -> dict[str, memoryview]:
        with _typed_errors(origin.id):
            contents = {name: read_file(Path(file.place), name) for name, file in origin.files}
            if any(_state(Path(file.place)) != file for _, file in origin.files):
                raise AdapterSourceError(f"the files of {quote(origin.id)} changed while they were read: try again")
        return contents

    def _find(self, id: str) -> Path | None:
        """The folder of an id, which may be the folder's path."""
        root = f"{self._root}/"
        return find_folder(self._root, id.removeprefix(root).removesuffix("/") if id.startswith(root) else id)

    def _files(self, directory: Path) -> Iterator[tuple[str, Path]]:
        """The paths of an adapter's files, by name. Links are followed, but not out of the directory."""
        names = os.listdir(directory)
        if (directory / NAMED_TEMPLATES).is_dir() and is_inside(directory / NAMED_TEMPLATES, self._root):
            names += [f"{NAMED_TEMPLATES}/{name}" for name in os.listdir(directory / NAMED_TEMPLATES)]
        if not {CONFIG, TENSORS} <= {*names} and not any(name.endswith((MLX_TENSORS, GGUF)) for name in names):
            names += islice(_below(directory), MOST_BELOW)
        for name in names:
            if is_telling(name) and is_inside(directory / name, self._root):
                yield name, (directory / name).resolve()


def _below(directory: Path) -> Iterator[str]:
    """The files in folders below this one."""
    for folder, _, names in os.walk(directory):
        if folder != str(directory):
            yield from (Path(folder, name).relative_to(directory).as_posix() for name in names)


def _state(path: Path) -> File:
    status = os.stat(path)
    version = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    return File(str(path), "-".join(map(str, version)), status.st_size)


@contextmanager
def _typed_errors(id: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise AdapterSourceError(f"the files of {quote(id)} are being written: try again") from error
    except OSError as error:
        raise AdapterSourceError(f"the files of {quote(id)} cannot be read: {error.strerror}") from error
