"""What is said of an adapter that cannot be served: which one it is and, of a name in the registry, only to those who
may know what it stands for, what is wrong."""

import logging
from collections.abc import Mapping

from loraplex_protos.errors import (
    AdapterError,
    AdapterForbiddenError,
    AdapterNotFoundError,
    AdapterSourceError,
    LoraplexError,
    quote,
)
from loraplex_router.adapters.registry import ADMINISTRATORS_SEE
from loraplex_router.vocabulary.references import AdapterReference, Reference, ids_of, parts_of

logger = logging.getLogger(__name__)

# Of the source, with what is said to those who may not know it.
FAULTS: Mapping[type[AdapterError], str] = {
    AdapterNotFoundError: "cannot be found in its source",
    AdapterSourceError: "cannot be fetched from its source, or is not what the registry says",
    AdapterForbiddenError: "is not handed out by its source",
}


def adapter_of(error: AdapterError, reference: Reference | None) -> Reference | None:
    """What the error is about: all of the reference, or one of the adapters to be merged."""
    return reference if error.place is None else parts_of(reference)[error.place]


def is_registered(reference: Reference | None) -> bool:
    """Whether it is a version in the registry. What is wrong with one is not its user's mistake."""
    return isinstance(reference, AdapterReference) and reference.version is not None


def explained(error: LoraplexError, reference: Reference | None) -> LoraplexError:
    """The error as it is told to who asked for the adapter: it names that if it is of the registry, or one of several
    to be merged. What is not told, since the reference is opaque, is logged."""
    if not isinstance(error, AdapterError) or (error.place is None and type(error) not in FAULTS):
        return error
    adapter = adapter_of(error, reference)
    if not isinstance(adapter, AdapterReference) or adapter.version is None:
        name = "" if error.place is None else quote(ids_of(adapter)[0])
        return error if name in error.message else type(error)(f"adapter {name}: {error.message}")
    named = f"adapter {adapter.id} of the registry"
    if type(error) not in FAULTS or not adapter.opaque:
        return type(error)(f"{named}: {error.message}")
    logger.warning("%s: %s", named, error.message)
    return type(error)(f"{named} {FAULTS[type(error)]}: {ADMINISTRATORS_SEE}")
