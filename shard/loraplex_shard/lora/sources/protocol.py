"""The interface of a source. `order.py` asks one source after the other. What is common to all sources, such as which
files of an adapter are read and how large they may be, is here and in `files.py`; how often they are tried, in
`patience.py`."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from loraplex_protos.errors import AdapterSourceError, quote
from loraplex_shard.lora.sources.files import AdapterFiles, assemble, choose, read_file
from loraplex_shard.lora.sources.patience import Progress, patiently


@dataclass(frozen=True, slots=True)
class File:
    """A file as it was when its source was asked. If place and version are the same, the content is the same."""

    place: str  # where it is in the source
    version: str
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Origin:
    """The files of an adapter in one state. Equal origins have equal contents."""

    source: "Source"
    id: str = field(compare=False)
    files: tuple[tuple[str, File], ...]  # the files to be read, by name
    revision: str = ""  # empty: its source has no revisions
    token: str = field(default="", repr=False, compare=False)  # of the request

    @classmethod
    def of(cls, source: "Source", id: str, files: Mapping[str, File], revision: str = "", token: str = "") -> Self:
        """Makes an origin of all files of an adapter, given by name. Raises AdapterInvalidError if files are missing or
        too large."""
        chosen = choose({name: file.size for name, file in files.items()})
        return cls(source, id, tuple((name, files[name]) for name in chosen), revision, token)

    @property
    def size(self) -> int:
        """Of all files, in bytes, as far as the source says it."""
        return sum(file.size for _, file in self.files)

    def fetch(self, progress: Progress) -> dict[str, Path]:
        """See Source.fetch. Tries several times if the source is busy."""
        progress.total = self.size
        return patiently(lambda: self.source.fetch(self, progress), progress)

    def read(self) -> AdapterFiles:
        """Reads the files. Raises the AdapterErrors of the source."""
        return assemble(self.source.read(self))


class Source(Protocol):
    """A place that adapters come from. Ids, revisions and tokens come from clients and have not been checked."""

    name: str  # its name in requests
    remote: bool = True  # whether its files have to be fetched

    @abstractmethod
    def refusal(self, id: str) -> str:
        """Why an id need not be looked up here for a request that names no source; empty if this source may have the
        id. It does not ask over the network."""

    @abstractmethod
    def locate(self, id: str, revision: str, token: str) -> Origin:
        """Finds an adapter's files without reading them. An empty revision stands for the newest one.

        Raises AdapterNotFoundError if there is no such adapter, AdapterForbiddenError if the source does not show it,
        AdapterSourceError if the source does not answer, and what Origin.of raises.
        """

    @abstractmethod
    def fetch(self, origin: Origin, progress: Progress) -> dict[str, Path]:
        """Brings the files to this machine's disk, unless they are there already. Returns their paths, by name.

        Keeps `progress.done` up to date. What arrives is compared with what the source says about it. Raises
        AdapterErrors: SourceBusyError if it may succeed later.
        """

    def read(self, origin: Origin) -> dict[str, memoryview]:
        """Returns the files' contents, by name. Raises AdapterErrors, also if the files have changed."""
        paths = origin.fetch(Progress(origin.id))
        try:
            return {name: read_file(path, name) for name, path in paths.items()}
        except OSError as error:
            raise AdapterSourceError(f"the files of {quote(origin.id)} cannot be read: {error.strerror}") from error
