"""Warnings about an answer, in a header: they are known before the answer."""

from collections.abc import Sequence

from loraplex_router.engine.output import Generation


def warning_header(generations: Sequence[Generation]) -> dict[str, str]:
    """Each warning once. Characters that headers may not contain are escaped."""
    found = dict.fromkeys(warning for generation in generations for warning in generation.warnings)
    text = "; ".join(found).encode("ascii", "backslashreplace").decode()
    return {"X-Loraplex-Warning": text} if text else {}
