"""Changes of the registry file through the API: versions, aliases, and their removal, each by compare-and-swap."""

from collections.abc import Mapping
from dataclasses import replace

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    FieldViolation,
    ForbiddenError,
    InvalidRequestError,
    quote,
)
from loraplex_router.adapters.registry import AT, Registered, reference_to
from loraplex_router.adapters.registry_file import RegistryFile, check
from loraplex_router.replicas.administration import Administration
from loraplex_router.vocabulary.references import AdapterReference, Upload, Version


class Declarations:
    """`file` is None without a registry file. All changes raise ForbiddenError if there is none, or if it cannot be
    written, and AdapterConflictError if the file is not as expected; nothing is changed then."""

    def __init__(self, administration: Administration, file: RegistryFile | None) -> None:
        self._administration = administration
        self._registry = administration.registry
        self._file = file

    @property
    def possible(self) -> bool:
        return self._file is not None

    async def register(self, name: str, reference: AdapterReference, expected_version: int | None) -> pb.AdapterStatus:
        """Makes an adapter the newest version of a name. Its source, commit and digest are written down as they are
        now. Raises AdapterErrors if it cannot be served."""
        self._writable()
        found = self._registry.resolve_one(reference, None)
        origin = found.origin
        if isinstance(origin, Upload):
            raise InvalidRequestError(FieldViolation("adapter.id", "is an upload, which no file can refer to"))
        content = await self._administration.stage(found)
        origin = replace(origin, source=content.source, revision=content.revision, token="")

        def add(registered: Registered) -> Registered:
            versions = dict(registered.names.get(name, {}))
            now = max(versions, default=0)
            _expect(name, expected_version, now)
            versions[now + 1] = Version(name, now + 1, origin, content.digest)
            return replace(registered, names={**registered.names, name: versions})

        await self._change(name, add)
        version = self._registry.find(name)
        assert version is not None
        return await self._administration.load(replace(reference_to(version), token=reference.token))

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
            if expected_version is not None:
                _expect(bare, expected_version, max(versions, default=0))
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
                raise AdapterNotFoundError(f"the registry has no {quote(name)}")
            return Registered(names, aliases)

        await self._change(name, take)

    async def _change(self, name: str, edit: RegistryFile.Edit) -> None:
        if name in self._registry.uploads:
            raise AdapterConflictError(f"{quote(name)} is an upload: remove it first")

        def checked(registered: Registered) -> Registered:
            changed = edit(registered)
            try:
                check(changed)
            except ValueError as error:
                raise InvalidRequestError(FieldViolation("name", str(error))) from None
            return changed

        for version in await self._writable().change(checked):
            self._administration.retire(version)

    def _writable(self) -> RegistryFile:
        if self._file is None:
            raise ForbiddenError("this server has no registry: start it with --adapter-registry FILE")
        return self._file


def _expect(name: str, expected: int | None, now: int) -> None:
    if expected not in (None, now):
        state = f"has version {now} now" if now else "is not registered"
        raise AdapterConflictError(f"{quote(name)} {state}: somebody else has changed it")


def _shown(targets: Mapping[str, float]) -> str:
    return ", ".join(f"{target} ({percent:g} %)" for target, percent in targets.items()) or "nothing"
