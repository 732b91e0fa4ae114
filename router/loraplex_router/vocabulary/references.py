"""How requests name adapters. A reference has a key, which covers all of it, and a name, which omits the token."""

from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TypeAlias

from loraplex_protos.adapter_names import normal


@dataclass(frozen=True, slots=True)
class AdapterReference:
    """How a request names an adapter. It is resolved to content. Its id is in normal form."""

    id: str
    source: str = ""
    revision: str = ""
    token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", normal(self.id))


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
    return _hash(reference.source, reference.id, reference.revision, reference.token)


def name_of(reference: Reference | None) -> str:
    """The same for every caller, and known before the adapter's content is; "" is the base model."""
    if reference is None:
        return ""
    if isinstance(reference, MergedReference):
        return _hash([name_of(part) for part in reference.adapters], *_settings(reference))
    return f"{reference.source}:{reference.id}:{reference.revision}"


def ids_of(reference: Reference | None) -> tuple[str, ...]:
    """The ids of the adapters that it names."""
    if reference is None:
        return ()
    return tuple(part.id for part in reference.adapters) if isinstance(reference, MergedReference) else (reference.id,)


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
