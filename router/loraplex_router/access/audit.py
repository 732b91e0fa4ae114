"""One log line for each action that an administrator takes or tries: who, what, on which adapter or request, and the
outcome. Never a key or a token.

Each record has its values in `fields`, which the log format writes as JSON or text.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from loraplex_protos.errors import LoraplexError, UnauthenticatedError
from loraplex_router.access.keys import Keys
from loraplex_router.vocabulary.references import AdapterReference

LONGEST = 512  # characters of a caller's text

logger = logging.getLogger(__name__)


@contextmanager
def audited(action: str, keys: Keys, key: str | None, **named: AdapterReference | str) -> Iterator[None]:
    """Logs the outcome of the block. `named` is one of adapter, digest and request_id."""
    began = time.monotonic()
    fields: dict[str, object] = {"action": action, "tenant": _tenant(keys, key)}
    for kind, value in named.items():
        if isinstance(value, AdapterReference):
            where = {"source": value.source[:LONGEST] or None, "revision": value.revision[:LONGEST] or None}
            fields |= {"adapter": value.id[:LONGEST], **where}
        else:
            fields[kind] = value[:LONGEST]
    outcome, reason = "done", None
    try:
        yield
    except LoraplexError as error:
        outcome, reason = error.error_type, error.message
        raise
    except BaseException:  # the caller is gone, or the router failed
        outcome = "interrupted"
        raise
    finally:
        fields |= {"outcome": outcome, "error": reason, "duration_ms": round((time.monotonic() - began) * 1e3, 1)}
        logger.info("audit", extra={"fields": fields})


def _tenant(keys: Keys, key: str | None) -> str | None:
    """The tenant's name; None if there are no keys, or for an unknown key."""
    try:
        return keys.tenant(key).name or None
    except UnauthenticatedError:
        return None
