"""How requests name adapters. A reference has a key, which covers all of it, and a name, which omits the token."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from secrets import token_hex
from typing import TypeAlias

from loraplex_protos.adapter_names import normal

UPLOADED = "upload"  # in place of a source's name


@dataclass(frozen=True, slots=True)
class AdapterReference:
    """How a request names an adapter. It is resolved to content. Its id is in normal form."""

    id: str
    source: str = ""
    revision: str = ""
    token: str = field(default="", repr=False)
    version: "Version | None" = None  # of a name in the registry: its id is the version's
    asked: str = field(default="", compare=False)  # the name or alias in the request that led to the version
    hidden: bool = field(default=False, compare=False)  # the registry has this name, too, and the source was named
    opaque: bool = field(default=False, compare=False)  # who asked may not know the version's origin

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", normal(self.id))

    @property
    def origin(self) -> "AdapterReference | Upload":
        """Where its content comes from: of a version, what the registry says."""
        origin = self if self.version is None else self.version.origin
        return origin if isinstance(origin, Upload) else replace(origin, token=self.token)


@dataclass(frozen=True)
class Upload:
    """An uploaded adapter. Each upload is its own origin, whatever is in it."""

    read: Callable[[], Mapping[str, memoryview]] = field(compare=False, repr=False)  # its files; may block
    id: str = field(default_factory=lambda: token_hex(16))
    source: str = UPLOADED
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Version:
    """What the registry says about one version of a name."""

    name: str
    number: int
    origin: AdapterReference | Upload
    digest: str = ""  # of its content; empty: any
    fault: str = ""  # why it can never be served; empty if nothing is known to be wrong

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"

    @property
    def uploaded(self) -> bool:
        return self.origin.source == UPLOADED


@dataclass(frozen=True, slots=True)
class MergedReference:
    """Several adapters, to be merged into one: see MergedAdapters in generation.proto."""

    adapters: tuple[AdapterReference, ...]
    weights: tuple[float, ...] = ()  # one per adapter; empty: 1 each
    strategy: str = "linear"
    density: float = 1.0
    majority_sign_method: str = "total"


Reference: TypeAlias = AdapterReference | MergedReference


def key_of(reference: Reference) -> str:
    """Identifies the reference, including its token, so that an adapter opened with one caller's token is not served to
    callers without it. Contains no token in clear text."""
    if isinstance(reference, MergedReference):
        return _hash([key_of(part) for part in reference.adapters], *_settings(reference))
    key, version = _hash(reference.source, reference.id, reference.revision, reference.token), reference.version
    if version is None:
        return key
    origin = version.origin  # an upload's content never changes, so its digest, which is found out later, adds nothing
    return _hash(key, origin.id) if isinstance(origin, Upload) else _hash(key, key_of(origin), version.digest)


def name_of(reference: Reference | None) -> str:
    """The same for every caller, and known before the adapter's content is; "" is the base model."""
    if reference is None:
        return ""
    if isinstance(reference, MergedReference):
        return _hash([name_of(part) for part in reference.adapters], *_settings(reference))
    return f"{reference.source}:{reference.id}:{reference.revision}"


def ids_of(reference: Reference | None) -> tuple[str, ...]:
    """The ids of the adapters that it names."""
    return tuple(part.id for part in parts_of(reference))


def asked_of(reference: Reference | None) -> tuple[str, ...]:
    """The same as the request named them."""
    return tuple(part.asked or part.id for part in parts_of(reference))


def labels_of(reference: Reference | None) -> tuple[str, ...]:
    """The same for usage and metrics, where each means one adapter: all uploads of a name together, and what the
    registry hides with its source."""
    return tuple(map(_label, parts_of(reference)))


def _label(part: AdapterReference) -> str:
    if part.version is not None:
        return part.version.name if isinstance(part.origin, Upload) else part.id
    return f"[{part.source}]{part.id}" if part.hidden else part.id


def version_of(reference: Reference | None) -> str:
    """The registry's versions among the adapters that it names."""
    return ",".join(part.id for part in parts_of(reference) if part.version is not None)


def parts_of(reference: Reference | None) -> tuple[AdapterReference, ...]:
    if isinstance(reference, MergedReference):
        return reference.adapters
    return () if reference is None else (reference,)


def replace_ids(reference: Reference | None, ids: tuple[str, ...]) -> Reference | None:
    """The reference with other ids of adapters, as many as it names. Raises ValueError if they are not as many."""
    if isinstance(reference, MergedReference):
        named = zip(reference.adapters, ids, strict=True)
        return replace(reference, adapters=tuple(replace(part, id=id) for part, id in named))
    return reference and replace(reference, id=ids[0])


def asked_as(reference: Reference | None, request: Reference | None) -> Reference | None:
    """The reference with the names that a request has for its adapters."""
    if isinstance(reference, MergedReference):
        named = zip(reference.adapters, parts_of(request), strict=True)
        return replace(reference, adapters=tuple(replace(part, asked=asked.id) for part, asked in named))
    return replace(reference, asked=request.id) if reference and isinstance(request, AdapterReference) else reference


def merged_digest(parts: list[str], merged: MergedReference) -> str:
    """A merged adapter's digest, which follows from its parts' content and its settings."""
    return _hash(parts, *_settings(merged))


def with_weights(merged: MergedReference) -> MergedReference:
    """The same reference, with a weight for every part."""
    return replace(merged, weights=merged.weights or (1.0,) * len(merged.adapters))


def _settings(merged: MergedReference) -> tuple[object, ...]:
    return with_weights(merged).weights, merged.strategy, merged.density, merged.majority_sign_method


def _hash(*values: object) -> str:
    return sha256(repr(values).encode()).hexdigest()
