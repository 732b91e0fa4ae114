"""One log line per request, when it has ended. Contains no prompt or answer unless configured.

Each record has its values in `fields`, which the log format writes as JSON or text.
"""

import logging

from loraplex_protos.errors import MAX_QUOTED
from loraplex_router.engine.generation import Generation
from loraplex_router.vocabulary.adapter import BASE_NAME
from loraplex_router.vocabulary.checks import MAX_ADAPTERS
from loraplex_router.vocabulary.references import ids_of
from loraplex_router.vocabulary.request import EmbedRequest, Request

logger = logging.getLogger(__name__)


class RequestLog:
    """`prompts`: whether to log prompts and answers, too."""

    def __init__(self, prompts: bool) -> None:
        self._prompts = prompts

    def ended(self, generation: Generation, outcome: str, now: float) -> None:
        """A queued request has ended, at a time from time.monotonic."""
        outputs = generation.outputs
        sequence = outputs[0].sequence
        started, first = generation.started, generation.first_token
        fields: dict[str, object] = {
            "request_id": generation.request_id,
            "tenant": generation.tenant or None,
            "adapter": generation.adapter_name,
            "digest": generation.adapter_digest[:12] or None,
            "outcome": outcome,
            "error": generation.error.message if generation.error is not None else None,
            "warnings": list(generation.warnings) or None,
            "finish": [output.finish_reason.name.lower() for output in outputs if output.finish_reason],
            "prompt_tokens": sequence.prompt_length,
            "prefix_hit_tokens": sum(output.sequence.prefix_hit for output in outputs),
            "generated_tokens": sum(output.generated for output in outputs),
            "queue_ms": _milliseconds((now if started is None else started) - generation.validated),
            "first_token_ms": None if first is None else _milliseconds(first - generation.arrived),
            "duration_ms": _milliseconds(now - generation.arrived),
        }
        if self._prompts:
            texts = [output.texts() for output in outputs]
            fields["prompt"] = texts[0][0]
            fields["answers"] = [answer for _, answer in texts]
        logger.info("request", extra={"fields": fields})

    def refused(self, request: Request | EmbedRequest, tenant: str, outcome: str, seconds: float) -> None:
        """A request that was not queued. Without a tenant, its key is not known, or nobody needs one."""
        fields: dict[str, object] = {
            "request_id": request.request_id[:128] or None,
            "tenant": tenant or None,
            "adapter": _describe(request)[:MAX_QUOTED],
            "outcome": outcome,
            "duration_ms": _milliseconds(seconds),
        }
        logger.info("request", extra={"fields": fields})


def _describe(request: Request | EmbedRequest) -> str:
    named = request.adapters[:MAX_ADAPTERS] if isinstance(request, Request) and request.adapters else (request.adapter,)
    return ",".join(",".join(ids_of(adapter)) or BASE_NAME for adapter in named)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 1)
