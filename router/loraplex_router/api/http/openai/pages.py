"""Pages of OpenAI's lists."""

from collections.abc import Sequence
from typing import Any

from loraplex_protos.errors import FieldViolation, InvalidRequestError, quote


def cut_page(ids: Sequence[str], limit: int | None, after: str, what: str) -> tuple[slice, dict[str, Any]]:
    """The part of a list with these ids that follows `after` (empty: its beginning), and the fields that describe it.
    Raises InvalidRequestError if `after` is not one of them: `what` it must be."""
    if after and after not in ids:
        raise InvalidRequestError(FieldViolation("after", f"must be {what}, which {quote(after)} is not"))
    start = ids.index(after) + 1 if after else 0
    stop = len(ids) if limit is None else min(start + limit, len(ids))
    page = ids[start:stop]
    first, last = (page[0], page[-1]) if page else (None, None)
    return slice(start, stop), {"first_id": first, "last_id": last, "has_more": stop < len(ids)}
