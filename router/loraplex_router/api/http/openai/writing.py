"""What completions and chat completions write alike: identity and usage."""

import time
from collections.abc import Sequence
from typing import Any

from loraplex_router.api.http.openai.schema import GenerationRequest, StreamOptions
from loraplex_router.engine.delta import Delta
from loraplex_router.engine.generation import Generation
from loraplex_router.engine.output import SequenceOutput
from loraplex_router.vocabulary.references import asked_of
from loraplex_router.vocabulary.sequence import FinishReason

FINISH_REASONS = {
    None: None,
    FinishReason.LENGTH: "length",
    FinishReason.END_TOKEN: "stop",
    FinishReason.STOP_TEXT: "stop",
}


def common_fields(kind: str, prefix: str, generation: Generation, model: str, version: str) -> dict[str, Any]:
    """The fields that every answer and chunk begins with."""
    return {
        "id": f"{prefix}-{generation.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"loraplex-{version}",
    }


def whose(generation: Generation, body: GenerationRequest) -> dict[str, str | None]:
    """Which adapter a choice is of, if several were asked; null is the base model."""
    return {"adapter": ",".join(asked_of(generation.reference)) or None} if body.adapters else {}


def token_ids(delta: Delta, body: GenerationRequest) -> dict[str, list[int]]:
    """The answer's new tokens, the one that ends it included, if they were asked for."""
    return {"token_ids": [sample.token for sample in delta.samples]} if body.return_token_ids else {}


def write_reasoning(text: str) -> dict[str, str]:
    """Thoughts under the names that clients read: DeepSeek's and SGLang's, and vLLM's newer one."""
    return {"reasoning_content": text, "reasoning": text}


def prompt_token_ids(output: SequenceOutput, body: GenerationRequest) -> dict[str, list[int]]:
    """The prompt's tokens, if they were asked for."""
    sequence = output.sequence
    return {"prompt_token_ids": sequence.tokens[: sequence.prompt_length]} if body.return_token_ids else {}


def usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """Each prompt counts once, however many sequences it has."""
    prompts = [generation.outputs[0].sequence for generation in generations]
    prompt = sum(sequence.prompt_length for sequence in prompts)
    completion = sum(output.generated for generation in generations for output in generation.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(sequence.prefix_hit for sequence in prompts)},
    }


def usage_so_far(options: StreamOptions | None, generations: Sequence[Generation]) -> dict[str, Any]:
    """The usage field of a stream's chunk: none unless requested, and null unless requested for every chunk."""
    if not options or not options.include_usage:
        return {}
    return {"usage": usage(generations) if options.continuous_usage_stats else None}
