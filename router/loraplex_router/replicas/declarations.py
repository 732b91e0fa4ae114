"""Changes of the registry file through the API: versions, uploads, aliases, and their removal, each by
compare-and-swap."""

import logging
from collections.abc import Mapping
from dataclasses import replace

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    FieldViolation,
    ForbiddenError,
    InvalidRequestError,
    LoraplexError,
    UnavailableError,
    quote,
)
from loraplex_router.adapters.registry import AT, Registered, reference_to
from loraplex_router.adapters.registry_content import ContentError, check
from loraplex_router.adapters.registry_file import RegistryFile
from loraplex_router.replicas.administration import Administration
from loraplex_router.replicas.statuses import status_registered
from loraplex_router.vocabulary.references import AdapterReference, Reference, Upload, Version

logger = logging.getLogger(__name__)


class Declarations:
    """`file` is None without a registry file. All changes raise ForbiddenError if there is none, or if it may not be
    written, UnavailableError if its disk is full or fails, and AdapterConflictError if the file is not as expected;
    nothing is changed then."""

    def __init__(self, administration: Administration, file: RegistryFile | None) -> None:
        self._administration = administration
        self._registry = administration.registry
        self._file = file

    @property
    def possible(self) -> bool:
        return self._file is not None

    @property
    def keep_uploads(self) -> bool:
        """Whether uploads are versions in the registry file. If not, they are only in this router's memory."""
        return self._file is not None and self._file.writable

    async def look(self) -> None:
        """Takes up what another router may have changed just now."""
        if self._file is not None:
            await self._file.look()

    async def catch_up(self, reference: Reference | None) -> None:
        """Takes up what another router may have registered just now, if the reference has a name that is not known."""
        if reference is not None and not self._registry.knows(reference):
            await self.look()

    async def check_room(self, size: int) -> None:
        """Raises OverloadedError if there is no room to keep an upload."""
        folder = self._writable().uploads
        await folder.run(folder.check_room, size)

    async def add_upload(self, upload: Version, expected_version: int | None) -> None:
        """Keeps an upload as the newest version of its name. The upload before it is forgotten, unless an alias stands
        for it. Raises OverloadedError if there is no room, UnavailableError if it cannot be written."""
        name, folder = upload.name, self._writable().uploads
        assert isinstance(upload.origin, Upload)
        try:
            kept = replace(upload, origin=await folder.run(folder.add, upload.origin))
        except OSError as error:
            raise UnavailableError(f"the upload cannot be kept in {folder.path}: {error.strerror}") from error

        def add(registered: Registered) -> Registered:
            _expect_no_alias(name, registered)
            versions = registered.names.get(name, {})
            now = max(versions, default=0)
            expect_version(name, expected_version, now)
            expect_older(name, upload.number, now)
            needed = {target for targets in registered.aliases.values() for target in targets}
            others = {each.number: each for each in versions.values() if not each.uploaded or str(each) in needed}
            return replace(registered, names={**registered.names, name: {**others, upload.number: kept}})

        try:
            await self._change(name, add)
        except LoraplexError:
            await folder.run(folder.remove, kept.origin.id)
            raise

    async def register(self, name: str, reference: AdapterReference, expected_version: int | None) -> pb.AdapterStatus:
        """Makes an adapter the newest version of a name. Its source, commit and digest are written down as they are
        now. Raises AdapterErrors if it cannot be served. Once it is registered, a failure is only logged: a client
        would send the call again, and make another version."""
        self._writable()
        found = self._registry.resolve_one(reference, None)
        content, origin = await self._administration.stage(found), found.origin
        if not isinstance(origin, Upload):
            origin = replace(origin, source=content.source, revision=content.revision, token="")

        def add(registered: Registered) -> Registered:
            _expect_no_alias(name, registered)
            versions = dict(registered.names.get(name, {}))
            now = max(versions, default=0)
            expect_version(name, expected_version, now)
            versions[now + 1] = Version(name, now + 1, origin, content.digest)
            return replace(registered, names={**registered.names, name: versions})

        await self._change(name, add)
        version = self._registry.find(name)
        assert version is not None
        registered = replace(reference_to(version), token=reference.token)
        try:
            return await self._administration.load(registered)
        except LoraplexError as error:
            logger.warning("adapter %s is registered, but not loaded: %s", version, error.message)
            return status_registered(registered, ())

    async def set_alias(
        self, name: str, targets: Mapping[str, float], expected: Mapping[str, float] | None
    ) -> pb.AdapterStatus:
        """Makes a name stand for other names. `expected`: what it must stand for now; empty: nothing."""

        def add(registered: Registered) -> Registered:
            now = registered.aliases.get(name, {})
            if expected is not None and dict(expected) != dict(now):
                raise AdapterConflictError(f"{quote(name)} stands for {_shown(now)} now: somebody else has changed it")
            return replace(registered, aliases={**registered.aliases, name: targets})

        await self._change(name, add)
        return pb.AdapterStatus(
            id=name,
            state=pb.ADAPTER_STATE_ALIAS,
            targets=[pb.AliasTarget(adapter=target, percent=percent) for target, percent in targets.items()],
        )

    async def remove(self, name: str, expected_version: int | None) -> None:
        """Removes an alias, a name with all its versions, or one of them, except the newest: its number would be given
        again. Raises AdapterNotFoundError."""

        def take(registered: Registered) -> Registered:
            names, aliases = dict(registered.names), dict(registered.aliases)
            bare, _, number = name.partition(AT)
            versions = names.get(bare, {})
            if expected_version is not None and name in aliases:
                why = f"is of names with versions, and {quote(name)} is an alias: leave it out"
                raise InvalidRequestError(FieldViolation("expected_version", why))
            expect_version(bare, expected_version, max(versions, default=0))
            _expect_nothing_leads_to(name, aliases)
            if name in aliases:
                del aliases[name]
            elif name in names:
                del names[name]
            elif number in map(str, versions):
                if int(number) == max(versions):
                    raise AdapterConflictError(
                        f"{quote(name)} is the newest version: register another, or remove {bare}"
                    )
                names[bare] = {other: version for other, version in versions.items() if other != int(number)}
            else:
                there = f"; its versions: {', '.join(map(str, sorted(versions)))}" if versions else ""
                raise AdapterNotFoundError(f"the registry has no {quote(name)}{there}")
            return Registered(names, aliases)

        await self._change(name, take)

    async def _change(self, name: str, edit: RegistryFile.Edit) -> None:
        if name in self._registry.uploads:
            raise AdapterConflictError(f"{quote(name)} is an upload: remove it first")

        def checked(registered: Registered) -> Registered:
            changed = edit(registered)
            try:
                check(changed)
            except ContentError as error:
                raise InvalidRequestError(FieldViolation(error.field, error.reason)) from None
            return changed

        for version in await self._writable().change(checked):
            self._administration.retire(version)

    def _writable(self) -> RegistryFile:
        if self._file is None:
            raise ForbiddenError("this server has no registry: start it with --adapter-registry FILE")
        return self._file


def expect_version(name: str, expected: int | None, now: int) -> None:
    """Raises AdapterConflictError unless a name has the version that is expected; 0: it is not registered."""
    if expected not in (None, now):
        state = f"has version {now} now" if now else "is not registered"
        wanted = f"should have version {expected}" if expected else "should be new"
        raise AdapterConflictError(f"{quote(name)} {state}, but {wanted}: somebody else has changed it")


def expect_older(name: str, number: int, now: int) -> None:
    """Raises AdapterConflictError if a name has this version now, or a later one."""
    if now >= number:
        raise AdapterConflictError(f"{quote(name)} has version {now} now: somebody else has changed it")


def _expect_no_alias(name: str, registered: Registered) -> None:
    if name in registered.aliases:
        raise AdapterConflictError(f"{quote(name)} is an alias: use another name, or remove it first")


def _expect_nothing_leads_to(name: str, aliases: Mapping[str, Mapping[str, float]]) -> None:
    """Raises AdapterConflictError if an alias leads to the name or to one of its versions."""
    leading = [
        alias
        for alias, targets in aliases.items()
        if any(name in (target, target.partition(AT)[0]) for target in targets)
    ]
    if leading:
        shown = ", ".join(map(quote, leading))
        said = f"the alias {shown} stands" if len(leading) == 1 else f"the aliases {shown} stand"
        fix = "let it stand for something else first, or remove it"
        fix = fix if len(leading) == 1 else fix.replace("it", "them")
        raise AdapterConflictError(f"{quote(name)} cannot be removed while {said} for it: {fix}")


def _shown(targets: Mapping[str, float]) -> str:
    return ", ".join(f"{target} ({percent:g} %)" for target, percent in targets.items()) or "nothing"
