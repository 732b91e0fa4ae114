"""Adapters on the Hugging Face hub, or on a server that speaks like it.

A request's token decides what the hub shows us on each call, also where the files are on our disk already. The token
appears in no message; without one, the server's own login is used, if it has any (HF_TOKEN).
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.tqdm import tqdm

from loraplex_protos.errors import (
    AdapterError,
    AdapterForbiddenError,
    AdapterNotFoundError,
    AdapterSourceError,
    quote,
)
from loraplex_shard.lora.sources.files import CONFIG, TENSORS, AdapterFiles, check_names, check_size, read_files
from loraplex_shard.lora.sources.folders import cached_name, find_snapshot
from loraplex_shard.lora.sources.text_files import text_files

_UNREACHABLE = frozenset({"TransportError", "ConnectionError", "TimeoutError"})  # of whichever HTTP library it uses
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"[\x21-\x7e]{0,1000}")


class _NoProgress(tqdm):
    """A server has no terminal to draw on."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class HubOrigin:
    """An adapter at a commit of its repository. Equal origins have equal contents."""

    id: str
    revision: str  # the commit
    names: tuple[str, ...]  # of its files
    endpoint: str
    cache: Path | None
    timeout_s: float
    token: str = field(repr=False, compare=False)

    @property
    def source(self) -> str:
        return "hub"

    def fetch(self) -> int:
        with _typed_errors(self.id, self.revision, self.token):
            return sum(self._fetch(name).stat().st_size for name in self.names)

    def read(self) -> AdapterFiles:
        with _typed_errors(self.id, self.revision, self.token):
            return read_files({name: self._fetch(name) for name in self.names})

    def _fetch(self, name: str) -> Path:
        """The file on our disk, fetched if it is not there yet."""
        path = hf_hub_download(
            self.id,
            name,
            revision=self.revision,
            token=self.token or None,
            endpoint=self.endpoint,
            cache_dir=self.cache,
            etag_timeout=self.timeout_s,
            tqdm_class=_NoProgress,
        )
        return Path(path)


class HubSource:
    """The adapters on one hub.

    `endpoint` defaults to HF_ENDPOINT, then to the public hub; `cache` (where files are kept) to the hub library's.
    """

    def __init__(self, endpoint: str | None = None, cache: Path | None = None, timeout_s: float = 10.0) -> None:
        self._endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._cache = cache
        self._timeout_s = timeout_s

    def locate(self, id: str, revision: str, token: str) -> HubOrigin:
        """Asks the hub which commit a revision is ("": the default branch) and which files it has; with HF_HUB_OFFLINE,
        the hub's cache.

        Raises AdapterNotFoundError, AdapterForbiddenError, AdapterSourceError, and AdapterInvalidError for a
        repository that holds no adapter or too large a one.
        """
        _check_arguments(revision, token)
        if constants.HF_HUB_OFFLINE:
            sizes, commit = self._look_into_cache(id, revision)
        else:
            sizes, commit = self._ask(id, revision, token)
        check_names(frozenset(sizes))
        names = (CONFIG, TENSORS, *text_files(sizes))
        for name in names:
            check_size(name, sizes[name] or 0)
        if not _COMMIT.fullmatch(commit):
            raise AdapterSourceError(f"the hub does not say which commit {quote(id)} is at")
        return HubOrigin(id, commit, names, self._endpoint, self._cache, self._timeout_s, token)

    def _ask(self, id: str, revision: str, token: str) -> tuple[dict[str, int | None], str]:
        """The files' sizes, and the commit."""
        with _typed_errors(id, revision, token):
            api = HfApi(endpoint=self._endpoint, token=token or None)
            info = api.model_info(id, revision=revision or None, files_metadata=True, timeout=self._timeout_s)
            return {file.rfilename: file.size for file in info.siblings or ()}, info.sha or ""

    def _look_into_cache(self, id: str, revision: str) -> tuple[dict[str, int | None], str]:
        """The same of what was fetched before. There is nobody to ask whom it may be shown to: all may see it."""
        cache = self._cache or Path(constants.HF_HUB_CACHE)
        with _typed_errors(id, revision, ""):
            newest = find_snapshot(cache / cached_name(id)) if revision in ("", "main") else None
            folder = newest or Path(
                snapshot_download(id, revision=revision or None, cache_dir=cache, local_files_only=True)
            )
            files = [path for path in folder.rglob("*") if path.is_file()]
            return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}, folder.name


def _check_arguments(revision: str, token: str) -> None:
    """What comes from a client becomes part of a URL, a path or a header. (The library checks the id.)"""
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise AdapterNotFoundError(f"{quote(revision)} cannot be the name of a revision")
    if not _TOKEN.fullmatch(token):
        raise AdapterForbiddenError("the token has characters that no hub token has")


@contextmanager
def _typed_errors(id: str, revision: str, token: str) -> Iterator[None]:
    try:
        yield
    except AdapterError:
        raise
    except HFValidationError:
        raise AdapterNotFoundError(f"{quote(id)} cannot be the name of an adapter on the hub") from None
    except RevisionNotFoundError as error:
        raise AdapterNotFoundError(f"the hub has {quote(id)}, but no revision {quote(revision)} of it") from error
    except LocalEntryNotFoundError as error:
        if not constants.HF_HUB_OFFLINE:
            raise AdapterSourceError(f"the hub cannot be reached for {quote(id)}") from error
        missing = f"{quote(id)} was not fetched from the hub before, and HF_HUB_OFFLINE is set"
        raise AdapterNotFoundError(missing) from error
    except HfHubHTTPError as error:
        raise _from_status(id, error.response.status_code, bool(token)) from error
    except Exception as error:
        # No connection, a timeout, an answer that is not the hub's: the library has no common class for these.
        unreachable = any(kind.__name__ in _UNREACHABLE for kind in type(error).__mro__)
        trouble = "cannot be reached for" if unreachable else "did not hand over"
        reason = getattr(error, "strerror", None) or type(error).__name__  # the disk's, as when it is full
        raise AdapterSourceError(f"the hub {trouble} {quote(id)}: {reason}") from error


def _from_status(id: str, status: int, has_token: bool) -> AdapterError:
    match status:
        case 401 if not has_token:  # the hub's answer to all that it does not show to everyone, existing or not
            return AdapterNotFoundError(f"the hub has no {quote(id)}; if it is private, pass a token that may read it")
        case 404:
            return AdapterNotFoundError(f"the hub has no {quote(id)}, or hides it from this token")
        case 401 | 403:
            return AdapterForbiddenError(f"the hub refuses to hand over {quote(id)} without a token that may read it")
        case _:
            return AdapterSourceError(f"the hub answered {status} for {quote(id)}")
