"""The registry: names that operators declare, each with numbered versions, and aliases of them. Pure: no clock, no
files.

A request may name an alias, a name (its newest version), or exactly one version, as `name@version`. A registered name
hides the same name in the sources, unless the request names its source.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from math import log
from operator import itemgetter
from typing import TypeAlias

from loraplex_protos.adapter_names import normal
from loraplex_protos.errors import AdapterInvalidError, AdapterNotFoundError, FieldViolation, InvalidRequestError, quote
from loraplex_router.vocabulary.references import AdapterReference, MergedReference, Reference, Version

AT = "@"  # between a name and a version; registered names do not contain it
COMMA = ","  # between the ids of adapters that are merged; no id contains it
ADMINISTRATORS_SEE = "tell the administrator, who sees why"  # instead of a reason, which may name a version's origin

# An id, with the version that it names, or with what it stands for: an alias's targets, or a name's newest version.
Line: TypeAlias = tuple[str, AdapterReference | Mapping[str, float]]


@dataclass(frozen=True)
class Registered:
    """The content of a registry, which has been checked."""

    names: Mapping[str, Mapping[int, Version]] = field(default_factory=dict)  # at least one version each
    aliases: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # to names, versions or aliases: per cent

    @cached_property
    def lines(self) -> list[Line]:
        """All that it declares, by id, sorted. With thousands of names, ask for it off the event loop first."""
        found: list[Line] = list(self.aliases.items())
        for name, versions in self.names.items():
            found += ((str(version), reference_to(version)) for version in versions.values())
            found.append((name, {f"{name}{AT}{max(versions)}": 100.0}))
        return sorted(found, key=itemgetter(0))


class Registry:
    """The current content. `fault` says why a later one was refused; empty: none was. `notify` is called when what is
    declared has changed, and `edition` is another one then."""

    def __init__(self, notify: Callable[[], None] = lambda: None) -> None:
        self._notify = notify
        self.edition = 0
        self.content = Registered()
        self.uploads: dict[str, Version] = {}  # by name
        self.fault = ""

    def update(self, content: Registered) -> list[AdapterReference]:
        """Replaces what is declared; it wins over uploads of the same name. Returns the versions that are not
        registered any more, or are something else now."""
        former, self.content, self.fault = self.content, content, ""
        left = [version for name, version in self.uploads.items() if self.declares(name)]
        self.uploads = {name: version for name, version in self.uploads.items() if not self.declares(name)}
        for name, versions in former.names.items():
            now = content.names.get(name)
            if versions is not now and versions != now:  # in a long registry, nearly all are as they were
                left += versions.values()
        self.edition += 1
        self._notify()
        return [
            reference_to(version) for version in left if self._versions(version.name).get(version.number) != version
        ]

    def upload_lines(self) -> list[Line]:
        """The same of uploads as Registered.lines."""
        return Registered({name: {version.number: version} for name, version in self.uploads.items()}).lines

    def lists(self, id: str) -> bool:
        """Whether a listing has this id."""
        return self.has(id) or self.find(id) is not None

    def declares(self, id: str) -> bool:
        return id in self.content.names or id in self.content.aliases

    def has(self, id: str) -> bool:
        return self.declares(id) or id in self.uploads

    def knows(self, reference: Reference) -> bool:
        """Whether there is all that the reference may name: not an id that it leaves to the sources."""
        parts = reference.adapters if isinstance(reference, MergedReference) else (reference,)
        return all(part.source or part.id in self.content.aliases or self.find(normal(part.id)) for part in parts)

    def bare(self, id: str) -> str:
        """The registered name in `name@version`; any other id is returned as it is. Permissions are for names. Of the
        id of a merged adapter, each of its names."""
        if COMMA in id:
            return COMMA.join(map(self.bare, id.split(COMMA)))
        name, at, _ = normal(id).partition(AT)
        return name if at and (name in self.content.names or name in self.uploads) else id

    def named(self, reference: Reference | None) -> Reference | None:
        """The reference with the names that a tenant must be allowed to use."""
        if isinstance(reference, MergedReference):
            return replace(reference, adapters=tuple(self._named(part) for part in reference.adapters))
        return reference and self._named(reference)

    def resolve(self, reference: Reference | None, session: str, may_know: Callable[[str], bool]) -> Reference | None:
        """The reference to the version that it names, or to the source that it names. Of an alias with weights, the
        session decides; equal sessions get the same version from every router. `may_know`: whether who asks may know
        the origin with this id; if not, the reference is opaque, and a version's fault is not told.

        Raises AdapterNotFoundError for a version that a registered name does not have, InvalidRequestError for a
        revision of a registered name.
        """
        if isinstance(reference, MergedReference):
            parts = tuple(self.resolve_one(part, session, may_know) for part in reference.adapters)
            return replace(reference, adapters=parts)
        return reference and self.resolve_one(reference, session, may_know)

    def _named(self, reference: AdapterReference) -> AdapterReference:
        return reference if reference.source else replace(reference, id=self.bare(reference.id), asked=reference.id)

    def resolve_one(
        self, reference: AdapterReference, session: str | None, may_know: Callable[[str], bool] = lambda origin_id: True
    ) -> AdapterReference:
        """As resolve. Without a session, an alias of several adapters is refused."""
        asked = target = reference.id
        if not self.has(self.bare(asked)):
            return reference
        if reference.source:
            return replace(reference, hidden=True)
        if reference.revision:
            why = f"{quote(asked)} is a name in the registry: request a version as NAME@VERSION, or name the source"
            raise InvalidRequestError(FieldViolation("adapter.revision", why))
        while targets := self.content.aliases.get(target):
            if session is None and len(targets) > 1:
                why = f"{quote(target)} is an alias of several adapters: name one of {', '.join(targets)}"
                raise InvalidRequestError(FieldViolation("adapter.id", why))
            target = _choose(target, targets, session or "")
        version = self.find(target)
        if version is None:
            versions = ", ".join(map(str, sorted(self._versions(self.bare(target)))))
            raise AdapterNotFoundError(f"the registry has no {quote(target)}; its versions: {versions}")
        known = may_know(version.origin.id)
        if version.fault:
            why = version.fault if known else ADMINISTRATORS_SEE
            raise AdapterInvalidError(f"{quote(target)} of the registry cannot be served: {why}")
        return replace(reference_to(version), token=reference.token, asked=asked, opaque=not known)

    def find(self, target: str) -> Version | None:
        """The version that `name` or `name@version` names."""
        name, at, number = target.partition(AT)
        versions = self._versions(name)
        if not at:
            return versions[max(versions)] if versions else None
        return versions.get(int(number)) if number.isascii() and number.isdecimal() and len(number) < 20 else None

    def with_content(self, digest: str) -> Version | None:
        """A version that is known to have this content."""
        declared = (version for versions in self.content.names.values() for version in versions.values())
        return next((version for version in declared if digest and version.digest == digest), None)

    def _versions(self, name: str) -> Mapping[int, Version]:
        upload = self.uploads.get(name)
        return {upload.number: upload} if upload else self.content.names.get(name, {})


def reference_to(version: Version) -> AdapterReference:
    return AdapterReference(str(version), version=version)


def _choose(alias: str, targets: Mapping[str, float], session: str) -> str:
    """Weighted rendezvous hashing: while only one target's share grows, its sessions stay."""

    def score(target: str) -> float:
        digest = blake2b(f"{alias}\0{target}\0{session}".encode(errors="replace"), digest_size=8).digest()
        return targets[target] / -log(((int.from_bytes(digest) >> 12) + 0.5) / 2**52)

    return max(targets, key=score)
