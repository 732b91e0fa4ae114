"""Where adapters come from: a request's id, source, revision and token -> the origin of its files."""

from collections.abc import Hashable
from pathlib import Path
from typing import Protocol

from loraplex_protos.errors import AdapterNotFoundError
from loraplex_shard.lora.files import AdapterFiles
from loraplex_shard.lora.hub import HubSource
from loraplex_shard.lora.local import LocalSource


class Origin(Hashable, Protocol):
    """The files of one adapter in one state. Equal origins have equal contents."""

    @property
    def source(self) -> str: ...
    @property
    def revision(self) -> str: ...
    def read(self) -> AdapterFiles:
        """Fetches and reads the files. Raises the AdapterErrors of its source."""


class Sources:
    """The adapter directory, if there is one, and the hub."""

    def __init__(self, directory: Path | None, hub: HubSource) -> None:
        self._local = LocalSource(directory) if directory is not None else None
        self._hub = hub

    def locate(self, id: str, source: str, revision: str, token: str) -> Origin:
        """source is "local", "hub", or "" for local if the directory has the name, else hub if the
        id has the form org/name.

        Raises the AdapterErrors of its source.
        """
        match source:
            case "local":
                return self._locate_local(id, revision)
            case "hub":
                return self._hub.locate(id, revision, token)
            case "" if self._local is not None and self._local.has(id):
                return self._locate_local(id, revision)
            case "" if "/" in id:
                return self._hub.locate(id, revision, token)
            case "":
                raise AdapterNotFoundError(f"there is no adapter {id[:200]!r}: names on the hub have the form org/name")
        raise AdapterNotFoundError(f"there is no adapter source {source[:100]!r}: it is local, hub or empty")

    def local_ids(self) -> list[str]:
        """The ids in the adapter directory, sorted."""
        return self._local.ids() if self._local is not None else []

    def _locate_local(self, id: str, revision: str) -> Origin:
        if self._local is None:
            raise AdapterNotFoundError("this server has no adapter directory (--adapters)")
        if revision:
            raise AdapterNotFoundError(f"{id[:200]!r} is in the adapter directory, where there are no revisions")
        return self._local.locate(id)
