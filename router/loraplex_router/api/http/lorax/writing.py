"""From generations to LoRAX's JSON and headers."""

import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote

from loraplex_router.api.http.sse import event
from loraplex_router.api.readers import Deltas
from loraplex_router.api.turns import in_turn
from loraplex_router.engine.delta import Delta
from loraplex_router.engine.generation import Generation
from loraplex_router.engine.output import SequenceOutput
from loraplex_router.text.tokenizer import Tokenizer
from loraplex_router.vocabulary.references import AdapterReference, MergedReference
from loraplex_router.vocabulary.sequence import FinishReason, Sample

FINISH_REASONS: Mapping[FinishReason | None, str] = {
    FinishReason.LENGTH: "length",
    FinishReason.END_TOKEN: "eos_token",
    FinishReason.STOP_TEXT: "stop_sequence",
}


def static_headers(model_id: str, inputs: str, adapter: AdapterReference | MergedReference | None) -> dict[str, str]:
    """The headers that are known before the answer. Characters that headers may not contain are percent-encoded."""
    headers = {"x-model-id": quote(model_id, safe="/:@,+ "), "x-compute-characters": str(len(inputs))}
    if adapter is not None:
        parts = adapter.adapters if isinstance(adapter, MergedReference) else (adapter,)
        headers["x-adapter-id"] = quote(",".join(part.id for part in parts), safe="/:@,+ ")
        if parts[0].source:
            headers["x-adapter-source"] = parts[0].source
    return headers


def whole_headers(generation: Generation) -> dict[str, str]:
    """Times in milliseconds, and token counts, of a finished generation."""
    now = time.monotonic()
    started, first = generation.started or now, generation.first_token or now
    prompt = generation.outputs[0].sequence.prompt_length
    generated = sum(output.generated for output in generation.outputs)
    inference = now - started
    return {
        "x-compute-time": _milliseconds(now - generation.arrived),
        "x-total-time": _milliseconds(now - generation.arrived),
        "x-validation-time": _milliseconds(generation.queued - generation.arrived),
        "x-queue-time": _milliseconds(started - generation.queued),
        "x-inference-time": _milliseconds(inference),
        "x-time-per-token": _milliseconds(inference / max(1, generated)),
        "x-time-to-first-token": _milliseconds(first - generation.arrived),
        "x-time-per-output-token": _milliseconds((now - first) / max(1, generated - 1)),
        "x-prompt-tokens": str(prompt),
        "x-generated-tokens": str(generated),
        "x-skipped-tokens": str(generation.outputs[0].sequence.prefix_hit),
        "x-total-tokens": str(prompt + generated),
    }


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))


class LoraxWriter:
    """Writes one generation's answer. `prefix` precedes each generated text."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer, details: bool, prefix: str) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._details = details
        self._prefix = prefix

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The likeliest sequence, together with the others if details were requested."""
        order = sorted(range(len(deltas)), key=lambda index: deltas[index].mean_logprob, reverse=True)
        sequences = [self._sequence(self._generation.outputs[index], deltas[index]) for index in order]
        best, *others = sequences
        answer: dict[str, Any] = {"generated_text": best.pop("generated_text")}
        if self._details:
            usage = self._generation.outputs[0].sequence
            counts = {"prompt_tokens": usage.prompt_length, "skipped_tokens": usage.prefix_hit}
            answer["details"] = {**best, **counts, **({"best_of_sequences": others} if others else {})}
        return answer

    async def events(self, deltas: Deltas) -> AsyncIterator[bytes]:
        """One event per token; a delta's events are written together. The texts add up to the whole text. If several
        tokens form one character, the last one has it."""
        text, at = "", 0
        async for _, delta in deltas:
            text += delta.text
            yield await in_turn(delta.num_logprobs, partial(self._events, delta, text, at))
            at = delta.ends[-1] if delta.ends else at

    def _events(self, delta: Delta, text: str, at: int) -> bytes:
        """`text` is the whole text so far; the new part begins `at`."""
        output, written = self._generation.outputs[0], []
        last = len(delta.samples) - 1 if delta.finish_reason else None
        for place, (sample, end) in enumerate(zip(delta.samples, delta.ends, strict=True)):
            token = self._token(sample, text[at:end])
            at = end
            written.append(event(self._last(output, delta, token, text) if place == last else _stream(token)))
        return b"".join(written)

    def _last(self, output: SequenceOutput, delta: Delta, token: dict[str, Any], text: str) -> dict[str, Any]:
        details = {
            "finish_reason": FINISH_REASONS[delta.finish_reason],
            "prompt_tokens": output.sequence.prompt_length,
            "generated_tokens": output.generated,
            "seed": output.seed,
        }
        return _stream(token, self._prefix + text, details if self._details else None)

    def _sequence(self, output: SequenceOutput, delta: Delta) -> dict[str, Any]:
        return {
            "generated_text": self._prefix + delta.text,
            "finish_reason": FINISH_REASONS[delta.finish_reason],
            "generated_tokens": output.generated,
            "seed": output.seed,
            "prefill": list(self._prefill(output)),
            "tokens": list(self._tokens(delta)) if self._details else [],
        }

    def _tokens(self, delta: Delta) -> Iterator[dict[str, Any]]:
        at = 0
        for sample, end in zip(delta.samples, delta.ends, strict=True):
            yield self._token(sample, delta.text[at:end])
            at = end

    def _token(self, sample: Sample, text: str) -> dict[str, Any]:
        special = self._tokenizer.is_special(sample.token)
        token = {
            "id": sample.token,
            "text": text or (self._tokenizer.token_text(sample.token) if special else ""),
            "logprob": sample.logprob,
            "special": special,
            "skipped": False,
        }
        if sample.alternatives:
            name = self._tokenizer.token_text
            token["alternative_tokens"] = [{"id": i, "text": name(i), "logprob": p} for i, p in sample.alternatives]
        return token

    def _prefill(self, output: SequenceOutput) -> Iterator[dict[str, Any]]:
        sequence = output.sequence
        if not sequence.detail.prompt_logprobs:
            return
        tokens = sequence.tokens[: sequence.prompt_length]
        pieces = self._tokenizer.token_texts(tokens, show_special_tokens=True)
        for token, text, logprob in zip(tokens, pieces, [None, *output.prompt_logprobs], strict=True):
            yield {"id": token, "text": text, "logprob": logprob}


def _stream(token: dict[str, Any], text: str | None = None, details: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"token": token, "generated_text": text, "details": details}
