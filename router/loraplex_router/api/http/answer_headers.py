"""What is known before an answer, in headers: warnings, and which adapter answers."""

from collections.abc import Iterable
from urllib.parse import quote

from loraplex_router.engine.generation import Generation
from loraplex_router.vocabulary.pooled import Classification, Embedding


def answer_headers(answers: Iterable[Generation | Embedding | Classification], request_id: str) -> dict[str, str]:
    """Each warning, digest and version once. Characters that headers may not contain are escaped."""
    answers = list(answers)
    warnings = _once(warning for answer in answers for warning in answer.warnings)
    headers = {
        "X-Request-Id": request_id,
        "X-Loraplex-Warning": "; ".join(warnings).encode("ascii", "backslashreplace").decode(),
        "X-Adapter-Digest": ",".join(_once(answer.adapter_digest for answer in answers)),
        "X-Adapter-Version": quote(",".join(_once(answer.adapter_version for answer in answers)), safe="/:@,+ "),
    }
    return {name: text for name, text in headers.items() if text}


def _once(texts: Iterable[str]) -> Iterable[str]:
    return filter(None, dict.fromkeys(texts))
