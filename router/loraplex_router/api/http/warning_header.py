"""Warnings about an answer, in a header: they are known before the answer."""

from collections.abc import Iterable

from loraplex_router.engine.output import Embedding, Generation


def warning_header(answers: Iterable[Generation | Embedding]) -> dict[str, str]:
    """Each warning once. Characters that headers may not contain are escaped."""
    found = dict.fromkeys(warning for answer in answers for warning in answer.warnings)
    text = "; ".join(found).encode("ascii", "backslashreplace").decode()
    return {"X-Loraplex-Warning": text} if text else {}
