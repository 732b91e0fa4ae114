"""Log probabilities in the shapes of OpenAI's two interfaces and of vLLM's prompt_logprobs. The token that ended an
answer is not part of its text, and not of its logprobs."""

from collections.abc import Iterator
from typing import Any

from loraplex_router.output import Delta, Sample, SequenceOutput
from loraplex_router.sequence import FinishReason
from loraplex_router.text.tokenizer import Tokenizer

LOWEST = -9999.0  # OpenAI's for what cannot be: JSON has no -Inf


def chat_logprobs(delta: Delta, tokenizer: Tokenizer) -> dict[str, Any]:
    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = tokenizer.token_text(token)
        return {"token": text, "logprob": _clamp(logprob), "bytes": list(text.encode())}

    return {
        "content": [
            {**entry(sample.token, sample.logprob), "top_logprobs": [entry(*pair) for pair in sample.alternatives]}
            for sample, _ in _with_text(delta)
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """The four lists of a completion's choice, whole or in pieces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._prompt: list[tuple[str, float | None]] = []
        self._echoed = self._at = 0  # characters of the prompt, and of the answer so far

    def add_prompt(self, output: SequenceOutput) -> None:
        """The prompt comes first. Its alternatives are not known."""
        tokens = output.sequence.tokens[: output.sequence.prompt_length]
        for token, logprob in zip(tokens, [None, *output.prompt_logprobs], strict=True):
            self._prompt.append((self._tokenizer.token_text(token), logprob))

    def take(self, delta: Delta) -> dict[str, Any]:
        tokens: list[str] = []
        logprobs: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for text, logprob in self._prompt:
            tokens.append(text)
            logprobs.append(None if logprob is None else _clamp(logprob))
            top.append(None)
            offsets.append(self._echoed)
            self._echoed += len(text)
        self._prompt = []
        for sample, end in _with_text(delta):
            tokens.append(self._tokenizer.token_text(sample.token))
            logprobs.append(_clamp(sample.logprob))
            worst_first = reversed(sample.alternatives)  # of tokens that look alike, the best is reported
            top.append({self._tokenizer.token_text(token): _clamp(value) for token, value in worst_first})
            offsets.append(self._echoed + self._at)
            self._at = end
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}


def prompt_logprobs(output: SequenceOutput, tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """As vLLM reports them, but of the prompt's own tokens alone."""
    tokens = output.sequence.tokens[1 : output.sequence.prompt_length]
    found: list[dict[str, Any] | None] = [None]
    for token, logprob in zip(tokens, output.prompt_logprobs, strict=True):
        found.append({str(token): {"logprob": _clamp(logprob), "decoded_token": tokenizer.token_text(token)}})
    return found


def _with_text(delta: Delta) -> Iterator[tuple[Sample, int]]:
    """The tokens that have text, each with the length of the whole text up to its end."""
    samples = list(zip(delta.samples, delta.ends, strict=True))
    yield from samples[:-1] if delta.finish_reason is FinishReason.END_TOKEN else samples


def _clamp(logprob: float | None) -> float:
    return max(LOWEST if logprob is None else logprob, LOWEST)
