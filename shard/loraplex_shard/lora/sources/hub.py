"""Adapters on the Hugging Face hub, or on a server with the same protocol.

A request's token decides what the hub shows on each call, even if the files are already on this machine's disk. The
token never appears in a message. Without a token, the server's own login is used, if it has one (HF_TOKEN).

The hub's library compares the sizes of files. Their sha256, where the hub says it, is compared here.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.tqdm import tqdm

from loraplex_protos.errors import (
    AdapterError,
    AdapterForbiddenError,
    AdapterNotFoundError,
    AdapterSourceError,
    quote,
)
from loraplex_shard.lora.sources.folders import cached_name, find_snapshot
from loraplex_shard.lora.sources.patience import BUSY, Progress, SourceBusyError
from loraplex_shard.lora.sources.protocol import File, Origin, Source

PUBLIC_HUB = "https://huggingface.co"
_UNREACHABLE = frozenset({"TransportError", "ConnectionError", "TimeoutError"})  # from any HTTP library
_REPOSITORY = re.compile(r"[^/:]+/[^/]+")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"[\x21-\x7e]{0,1000}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubSource(Source):
    """The adapters on one hub.

    `endpoint` defaults to HF_ENDPOINT, then to the public hub. `cache`, where files are kept, defaults to the hub
    library's cache.
    """

    name = "hub"

    def __init__(self, endpoint: str | None = None, cache: Path | None = None, timeout_s: float = 10.0) -> None:
        self._endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._cache = cache
        self._timeout_s = timeout_s

    def refusal(self, id: str) -> str:
        return "" if _REPOSITORY.fullmatch(self._repository(id)) else "names on the hub have the form org/name"

    def locate(self, id: str, revision: str, token: str) -> Origin:
        """Asks the hub for the commit of a revision ("": the default branch) and for its files. With HF_HUB_OFFLINE,
        the hub's cache is asked instead."""
        id = self._repository(id)
        _check_arguments(revision, token)
        if constants.HF_HUB_OFFLINE:
            sizes, commit = self._look_into_cache(id, revision)
        else:
            sizes, commit = self._ask(id, revision, token)
        files = {name: File(f"{id}/{name}", commit, size or 0) for name, size in sizes.items()}
        origin = Origin.of(self, id, files, commit, token)
        if not _COMMIT.fullmatch(commit):
            raise AdapterSourceError(f"the hub did not return the commit of {quote(id)}")
        return origin

    def fetch(self, origin: Origin, progress: Progress) -> dict[str, Path]:
        paths: dict[str, Path] = {}
        progress.reach(0)
        with _typed_errors(origin.id, origin.revision, origin.token):
            for name, _ in origin.files:
                before = progress.done
                paths[name] = self._fetch(origin, name, progress)
                progress.reach(before + paths[name].stat().st_size)
        return paths

    def _fetch(self, origin: Origin, name: str, progress: Progress) -> Path:
        known = try_to_load_from_cache(origin.id, name, self._cache, origin.revision)
        if isinstance(known, str):
            return Path(known)
        before = progress.done
        fetched = hf_hub_download(
            origin.id,
            name,
            revision=origin.revision,
            token=origin.token or None,
            endpoint=self._endpoint,
            cache_dir=self._cache,
            etag_timeout=self._timeout_s,
            tqdm_class=_bar_of(progress),
        )
        path = Path(fetched)
        said = path.resolve().name  # the cache calls a file by its ETag: of large files, their sha256
        if _SHA256.fullmatch(said):
            with path.open("rb") as file:
                got = hashlib.file_digest(file, "sha256").hexdigest()
            if got != said:
                path.resolve().unlink()
                progress.reach(before)
                raise SourceBusyError(
                    f"{name} of {quote(origin.id)} arrived damaged: its sha256 is {got}, but the hub says {said}"
                )
        return path

    def _repository(self, id: str) -> str:
        """The repository of an id, which may be the address of its page."""
        for address in (f"{self._endpoint}/", f"{PUBLIC_HUB}/", "hf://"):
            id = id.removeprefix(address)
        return id

    def _ask(self, id: str, revision: str, token: str) -> tuple[dict[str, int | None], str]:
        """Returns the files' sizes, and the commit."""
        with _typed_errors(id, revision, token):
            api = HfApi(endpoint=self._endpoint, token=token or None)
            info = api.model_info(id, revision=revision or None, files_metadata=True, timeout=self._timeout_s)
            return {file.rfilename: file.size for file in info.siblings or ()}, info.sha or ""

    def _look_into_cache(self, id: str, revision: str) -> tuple[dict[str, int | None], str]:
        """Returns the same for what was fetched before. The hub cannot be asked who may see it, so everybody may."""
        cache = self._cache or Path(constants.HF_HUB_CACHE)
        with _typed_errors(id, revision, ""):
            newest = find_snapshot(cache / cached_name(id)) if revision in ("", "main") else None
            folder = newest or Path(
                snapshot_download(id, revision=revision or None, cache_dir=cache, local_files_only=True)
            )
            files = [path for path in folder.rglob("*") if path.is_file()]
            return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}, folder.name


def _check_arguments(revision: str, token: str) -> None:
    """Checks what comes from a client and becomes a part of a URL, a path or a header. (The library checks the id.)"""
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise AdapterNotFoundError(f"{quote(revision)} is not a valid revision name")
    if not _TOKEN.fullmatch(token):
        raise AdapterForbiddenError("the token has characters that hub tokens cannot have")


def _bar_of(progress: Progress) -> type[tqdm]:
    """A progress bar that shows nothing, since a server has no terminal, and counts in `progress`."""

    class Bar(tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            progress.reach(progress.done + int(n or 0))

    return Bar


@contextmanager
def _typed_errors(id: str, revision: str, token: str) -> Iterator[None]:
    try:
        yield
    except AdapterError:
        raise
    except HFValidationError:
        raise AdapterNotFoundError(f"{quote(id)} is not a valid hub repository id") from None
    except RevisionNotFoundError as error:
        raise AdapterNotFoundError(f"the hub has {quote(id)}, but not its revision {quote(revision)}") from error
    except LocalEntryNotFoundError as error:
        if not constants.HF_HUB_OFFLINE:
            raise SourceBusyError(f"cannot reach the hub for {quote(id)}") from error
        missing = f"{quote(id)} is not in the hub cache, and HF_HUB_OFFLINE is set"
        raise AdapterNotFoundError(missing) from error
    except HfHubHTTPError as error:
        raise _from_status(id, error.response.status_code, error.response.headers, bool(token)) from error
    except Exception as error:
        # There was no connection, a timeout, or an answer of something else. The library has no common class for these.
        unreachable = any(kind.__name__ in _UNREACHABLE for kind in type(error).__mro__)
        trouble = "cannot be reached for" if unreachable else "did not return"
        disk = getattr(error, "strerror", None)  # an error of the disk, such as a full one
        kind = AdapterSourceError if disk and not unreachable else SourceBusyError
        raise kind(f"the hub {trouble} {quote(id)}: {disk or type(error).__name__}") from error


def _from_status(id: str, status: int, headers: Mapping[str, str], has_token: bool) -> AdapterError:
    match status:
        case 401 if not has_token:  # for whatever the hub does not show to everyone, whether it exists or not
            return AdapterNotFoundError(f"the hub has no {quote(id)}; if it is private, pass a token that may read it")
        case 404:
            return AdapterNotFoundError(f"the hub has no {quote(id)}, or hides it from this token")
        case 401 | 403:
            return AdapterForbiddenError(f"the hub refuses to hand over {quote(id)} without a token that may read it")
        case _ if status in BUSY:
            wait = _seconds(headers.get("retry-after", ""))
            later = f" and asks to try again in {wait:.0f} s" if wait is not None else ""
            return SourceBusyError(f"the hub answered {status} for {quote(id)}{later}", wait)
        case _:
            return AdapterSourceError(f"the hub answered {status} for {quote(id)}")


def _seconds(retry_after: str) -> float | None:
    """The seconds in a Retry-After header, which has a number or a date; None if it has neither."""
    if retry_after.isascii() and retry_after.isdecimal():
        return float(retry_after[:9])
    with suppress(ValueError):
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    return None
