"""The seam to a place that adapters come from. `order.py` asks one source after the other; whatever holds for all of
them, such as which of an adapter's files are read and how large they may be, is here and in `files.py`."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, Self

from loraplex_shard.lora.sources.files import AdapterFiles, assemble, choose


@dataclass(frozen=True, slots=True)
class File:
    """A file as it was when its source was asked. Equal places and versions have equal contents."""

    place: str  # where the source has it
    version: str
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Origin:
    """The files of one adapter in one state. Equal origins have equal contents."""

    source: "Source"
    id: str = field(compare=False)
    files: tuple[tuple[str, File], ...]  # those that are read, by name
    revision: str = ""  # empty: its source has none
    token: str = field(default="", repr=False, compare=False)  # of whoever asked

    @classmethod
    def of(cls, source: "Source", id: str, files: Mapping[str, File], revision: str = "", token: str = "") -> Self:
        """Of all that there is of an adapter, by name. Raises AdapterInvalidError if files are missing or too large."""
        chosen = choose({name: file.size for name, file in files.items()})
        return cls(source, id, tuple((name, files[name]) for name in chosen), revision, token)

    def fetch(self) -> int:
        """See Source.fetch."""
        return self.source.fetch(self)

    def read(self) -> AdapterFiles:
        """Reads the files. Raises the AdapterErrors of the source."""
        return assemble(self.source.read(self))


class Source(Protocol):
    """Where adapters come from. Ids, revisions and tokens are a client's: nothing about them has been checked."""

    name: str  # what requests call it

    @abstractmethod
    def refusal(self, id: str) -> str:
        """Why a request that names no source need not be looked up here; empty if the id may be one of this source.
        Found out without asking anybody."""

    @abstractmethod
    def locate(self, id: str, revision: str, token: str) -> Origin:
        """Finds an adapter's files, and reads nothing of them. An empty revision is the newest.

        Raises AdapterNotFoundError if there is no such adapter, AdapterForbiddenError if the source does not show it,
        AdapterSourceError if the source does not answer, and as Origin.of does.
        """

    def fetch(self, origin: Origin) -> int:
        """Brings the files to this machine's disk, if the source has a place for them there; answers their size in
        bytes. Raises AdapterErrors."""
        return sum(file.size for _, file in origin.files)

    @abstractmethod
    def read(self, origin: Origin) -> dict[str, memoryview]:
        """What is in the files, by name. Raises AdapterErrors, also if the files are not what they were."""
