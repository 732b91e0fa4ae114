"""What a client should know of its answer, in a header: it is known before the answer is."""

from collections.abc import Sequence

from loraplex_router.engine.output import Generation


def warning_header(generations: Sequence[Generation]) -> dict[str, str]:
    """Each warning once. Characters that no header may hold are escaped."""
    found = dict.fromkeys(warning for generation in generations for warning in generation.warnings)
    text = "; ".join(found).encode("ascii", "backslashreplace").decode()
    return {"X-Loraplex-Warning": text} if text else {}
