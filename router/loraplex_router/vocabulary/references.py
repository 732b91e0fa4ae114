"""How requests name adapters, and what a reference is called inside: its key, which stands for all of it, and its name,
which leaves out the token."""

from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TypeAlias

from loraplex_protos.adapter_names import normal


@dataclass(frozen=True, slots=True)
class AdapterReference:
    """How a request names an adapter. The registry turns it into content. Its id is in normal form."""

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
    """Stands for the reference, its token included, so that an adapter which one caller's token opened is not given to
    callers without it. Holds no token in the clear."""
    if isinstance(reference, MergedReference):
        return _hash([key_of(part) for part in reference.adapters], *_settings(reference))
    return _hash(reference.source, reference.id, reference.revision, reference.token)


def name_of(reference: Reference | None) -> str:
    """The same for every caller, and known before anything is of the adapter's content; "" is the base model."""
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
    """What a merged adapter is follows from its parts' content."""
    return _hash(parts, *_settings(merged))


def with_weights(merged: MergedReference) -> MergedReference:
    """The same, with a weight for every part."""
    return replace(merged, weights=merged.weights or (1.0,) * len(merged.adapters))


def _settings(merged: MergedReference) -> tuple[object, ...]:
    return with_weights(merged).weights, merged.strategy, merged.density, merged.majority_sign_method


def _hash(*values: object) -> str:
    return sha256(repr(values).encode()).hexdigest()
