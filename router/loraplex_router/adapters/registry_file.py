"""Reads the file (YAML or JSON) of --adapter-registry, and rereads it when it changes.

adapters:
  sql:
    1: {id: acme/sql-lora, source: hub, revision: 5f3c2d1}
    2: {id: acme/sql-lora, source: hub, revision: 9ab07e4}
aliases:
  sql-stable: sql@1
  sql-canary: {sql@1: 95, sql@2: 5}  # per cent
"""

import asyncio
import errno
import fcntl
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from math import isclose
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loraplex_protos.adapter_names import RULE, is_id, is_name, normal
from loraplex_protos.errors import AdapterConflictError, ForbiddenError, LoraplexError, UnavailableError, quote
from loraplex_router.access import followed_file
from loraplex_router.access.followed_file import FollowedFile
from loraplex_router.access.replaced_file import replace_file
from loraplex_router.access.strict_yaml import describe, read_yaml
from loraplex_router.adapters.registry import AT, Registered, Registry
from loraplex_router.adapters.upload_folder import UploadFolder
from loraplex_router.vocabulary.references import AdapterReference, Version

logger = logging.getLogger(__name__)

_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # in C, if PyYAML was built with it: three times as fast

Number = Annotated[int, Field(ge=1, lt=2**63, strict=False)]  # of a version; JSON's keys are texts
Weight = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
UPLOAD = re.compile("[0-9a-f]{32}")  # an uploaded adapter's id


class ContentError(ValueError):
    """Content that no registry has. `field` is what of a change is wrong: "name" or "targets"."""

    def __init__(self, place: str, reason: str, field: str = "name") -> None:
        super().__init__(f"{place}: {reason}")
        self.field, self.reason = field, reason


class RegistryFileError(LoraplexError):
    """The registry file cannot be used. The message says where the fault is."""


class _Origin(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    id: str  # in its source
    source: str = ""
    revision: str = ""
    digest: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""  # that its content must have


class _RegistryFile(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    adapters: dict[str, Annotated[dict[Number, _Origin], Field(min_length=1)]] = {}
    aliases: dict[str, str | Annotated[dict[str, Weight], Field(min_length=1)]] = {}


class RegistryFile:
    """Keeps a registry as its file says. Raises RegistryFileError if the file is invalid at the start."""

    def __init__(
        self, path: Path, registry: Registry, gone: Callable[[AdapterReference], None], most_upload_bytes: int
    ) -> None:
        """`gone` is called with each version that leaves the registry."""
        self._path = path
        target = path.resolve()
        self.writable = os.access(target.parent, os.W_OK)
        if not self.writable:
            logger.info("the adapter registry cannot be written here: uploads are in this router's memory alone")
        self.uploads = UploadFolder(target.with_name(f"{target.name}.uploads"), most_upload_bytes)
        self._file = FollowedFile(path)
        self._registry = registry
        self._gone = gone
        self._changing, self._looking = asyncio.Lock(), asyncio.Lock()
        registry.update(self._read())

    Edit = Callable[[Registered], Registered]

    async def change(self, edit: Edit) -> list[AdapterReference]:
        """Changes the file as it is now, which another router may have written, and takes up what it says then. Returns
        as Registry.update does.

        Raises what `edit` raises, ForbiddenError if the file may not be written, UnavailableError if it cannot be, as
        on a full disk, AdapterConflictError while it is wrong.
        """
        async with self._changing:
            return self._registry.update(await asyncio.to_thread(self._rewrite, edit))

    def _rewrite(self, edit: Edit) -> Registered:
        path = self._path.resolve()
        try:
            with open(path.with_name(f".{path.name}.lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                former = read_registry(path)
                changed = edit(former)
                replace_file(
                    path, lambda file: file.write(write_registry(changed, self._path.suffix == ".json").encode())
                )
                self.uploads.keep_only(_uploads(changed), _uploads(former))
                return self._opened(changed)
        except RegistryFileError as error:
            raise AdapterConflictError(f"the registry file is wrong, mend it first: {error.message}") from error
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                why = f"the registry file cannot be written here ({error.strerror}): change it where it comes from"
                raise ForbiddenError(why) from error
            raise UnavailableError(f"the registry file cannot be written: {error.strerror}: try again") from error

    def _read(self) -> Registered:
        """What the file says. Raises RegistryFileError."""
        content = read_registry(self._path)
        while True:
            opened = self._opened(content)
            missing = [id for id in _uploads(content) if not self.uploads.has(id)]
            former, content = content, read_registry(self._path) if missing else content
            if content == former:  # otherwise another router has replaced an upload meanwhile
                break
        if missing:
            logger.error("uploads in the adapter registry are not in %s: %s", self.uploads.path, ", ".join(missing))
        return opened

    def _opened(self, content: Registered) -> Registered:
        """The content with uploads that can be read."""
        names = {
            name: {
                number: replace(version, origin=self.uploads.open(version.origin.id)) if version.uploaded else version
                for number, version in versions.items()
            }
            for name, versions in content.names.items()
        }
        return replace(content, names=names)

    async def reread(self) -> None:
        """Takes up what the file says now. Raises RegistryFileError."""
        async with self._changing:
            for version in self._registry.update(await asyncio.to_thread(self._read)):
                self._gone(version)

    async def follow(self) -> None:
        """Looks at the file periodically, until cancelled."""
        while True:
            await asyncio.sleep(followed_file.LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Takes up what the file says, if it has changed. Keeps the old content while the file is invalid."""
        async with self._looking:  # so that nobody finds the old content while somebody else takes up the new one
            state = await asyncio.to_thread(self._file.state)
            if state == self._file.seen:
                return
            try:
                await self.reread()
                logger.info("reloaded the adapter registry: %d names", len(self._registry.content.names))
            except RegistryFileError as error:
                self._registry.fault = error.message
                logger.error("keeping the previous adapter registry: %s", error)
            self._file.seen = state  # only now, since a request that looks may be cancelled


def read_registry(path: Path) -> Registered:
    """Raises RegistryFileError."""
    try:
        data = path.read_bytes()
        if not data.strip():  # it may be about to be written
            raise ValueError("it is empty: write `adapters: {}` if there are none")
        content = read_yaml(data)
        file = _RegistryFile.model_validate({} if content is None else content)
        registered = Registered(
            {name: dict(_versions(name, versions)) for name, versions in file.adapters.items()},
            {alias: {to: 100.0} if isinstance(to, str) else to for alias, to in file.aliases.items()},
        )
        check(registered)
    except OSError as error:
        raise RegistryFileError(f"--adapter-registry: {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise RegistryFileError(f"--adapter-registry: {path}: {describe(error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f" in line {mark.line + 1}" if mark else ""
        raise RegistryFileError(f"--adapter-registry: {path} is not YAML{place}: {problem or error}") from None
    except ValueError as error:
        raise RegistryFileError(f"--adapter-registry: {path}: {error}") from None
    return registered


def write_registry(content: Registered, as_json: bool = False) -> str:
    """The content as a file says it, in YAML or in JSON."""
    adapters = {
        name: {number: _write_origin(version) for number, version in versions.items()}
        for name, versions in content.names.items()
    }
    aliases = {alias: dict(targets) for alias, targets in content.aliases.items()}
    written = {"adapters": adapters, "aliases": aliases}
    if as_json:
        return json.dumps(written, indent=2, ensure_ascii=False) + "\n"
    text: str = yaml.dump(written, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def check(content: Registered) -> None:
    """Raises ContentError for content that would not be clear to a request."""
    for name, versions in content.names.items():
        _check_name(f"adapters.{name}", name)
        for number, version in versions.items():
            id, place = version.origin.id, f"adapters.{name}.{number}.id"
            if not is_id(id):
                raise ContentError(place, f"{quote(id)} is not a valid id: {RULE}")
            if version.uploaded and not UPLOAD.fullmatch(id):
                raise ContentError(place, f"{quote(id)} is not an upload's id")
    for alias, targets in content.aliases.items():
        place = f"aliases.{alias}"
        _check_name(place, alias)
        if alias in content.names:
            raise ContentError(place, "is a name in `adapters`, too: give the alias another name")
        for target in targets:
            _check_target(place, target, content)
        if not all(0 < percent <= 100 for percent in targets.values()):
            raise ContentError(place, "every weight must be between 0 and 100", "targets")
        total = sum(targets.values())
        if not isclose(total, 100, abs_tol=1e-6):
            raise ContentError(place, f"the weights add up to {total:g}, not to 100", "targets")
    try:
        TopologicalSorter(content.aliases).prepare()
    except CycleError as error:
        raise ContentError(
            "aliases", f"they lead in a circle: {' -> '.join(reversed(error.args[1]))}", "targets"
        ) from None


def _check_name(place: str, name: str) -> None:
    if not is_name(name) or AT in name or name != normal(name):
        raise ContentError(place, f"is not a valid name: {RULE}; a registered one does not contain {AT}")


def _check_target(place: str, target: str, content: Registered) -> None:
    name, at, number = target.partition(AT)
    versions = content.names.get(name)
    if versions is None and (at or target not in content.aliases):
        raise ContentError(place, f"the registry has no {quote(name)}", "targets")
    if versions is not None and at and number not in map(str, versions):
        raise ContentError(place, f"{quote(name)} has no version {quote(number)}", "targets")


def _write_origin(version: Version) -> dict[str, str]:
    origin = version.origin
    fields = {"id": origin.id, "source": origin.source, "revision": origin.revision, "digest": version.digest}
    return {name: value for name, value in fields.items() if value}


def _uploads(content: Registered) -> set[str]:
    """The ids of its uploads."""
    each = (version for versions in content.names.values() for version in versions.values())
    return {version.origin.id for version in each if version.uploaded}


def _versions(name: str, versions: Mapping[int, _Origin]) -> Iterator[tuple[int, Version]]:
    for number, origin in versions.items():
        reference = AdapterReference(origin.id, origin.source, origin.revision)
        yield number, Version(name, number, reference, origin.digest)
