"""Where adapters come from: a request's id, source, revision and token -> the origin of its files."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Protocol

from loraplex_protos.adapter_names import is_name
from loraplex_protos.errors import AdapterNotFoundError, AdapterSourceError, quote
from loraplex_shard.lora.sources.files import AdapterFiles
from loraplex_shard.lora.sources.hub import HubSource
from loraplex_shard.lora.sources.local import LocalSource

if TYPE_CHECKING:
    from loraplex_shard.lora.sources.s3 import S3Source  # imports boto3, which only those need who use it


class Origin(Hashable, Protocol):
    """The files of one adapter in one state. Equal origins have equal contents."""

    @property
    def source(self) -> str: ...
    @property
    def revision(self) -> str: ...
    def fetch(self) -> int:
        """Brings the files to this machine's disk, if their source has a place for them there; answers their size in
        bytes. Raises the AdapterErrors of its source."""

    def read(self) -> AdapterFiles:
        """Reads the files, and fetches what is not on the disk. Raises the AdapterErrors of its source."""


class Sources:
    """The adapter directory and S3, if there are any, and the hub."""

    def __init__(self, local: LocalSource | None, hub: HubSource, s3: "S3Source | None" = None) -> None:
        self._local = local
        self._hub = hub
        self._s3 = s3

    def locate(self, id: str, source: str, revision: str, token: str) -> Origin:
        """source is "local", "s3", "hub", or "" for the first of them that has the id; the hub has no id that is not
        like org/name.

        Raises the AdapterErrors of its source.
        """
        match source:
            case "local":
                return self._locate_local(id, revision)
            case "s3":
                return self._locate_s3(id, revision)
            case "hub":
                return self._hub.locate(id, revision, token)
            case "":
                return self._locate_anywhere(id, revision, token)
        raise AdapterNotFoundError(f"there is no adapter source {quote(source)}: it is local, s3, hub or empty")

    def _locate_anywhere(self, id: str, revision: str, token: str) -> Origin:
        if self._local is not None and self._local.has(id):
            return self._locate_local(id, revision)
        missing = "this server has no adapter directory (--adapters)"
        if self._local is not None:
            missing = f"the adapter directory has no {quote(id)}"
        if self._s3 is not None and not revision and is_name(id):
            try:
                return self._s3.locate(id, revision)
            except AdapterNotFoundError as error:
                missing = f"{missing}; {error.message}"
        if "/" not in id:
            raise AdapterNotFoundError(f"{missing}; names on the hub have the form org/name")
        try:
            return self._hub.locate(id, revision, token)
        except (AdapterNotFoundError, AdapterSourceError) as error:
            raise type(error)(f"{missing}; {error.message}") from error

    def _locate_s3(self, id: str, revision: str) -> Origin:
        if self._s3 is None:
            raise AdapterNotFoundError("this server has no adapters in S3 (--adapters-s3)")
        return self._s3.locate(id, revision)

    def _locate_local(self, id: str, revision: str) -> Origin:
        if self._local is None:
            raise AdapterNotFoundError("this server has no adapter directory (--adapters)")
        if revision:
            raise AdapterNotFoundError(f"{quote(id)} is in the adapter directory, where there are no revisions")
        return self._local.locate(id)
