"""Log probabilities in the form of OpenAI's two interfaces and of vLLM's prompt_logprobs. The token that ends an answer
is neither part of its text nor of its logprobs."""

from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from loraplex_router.engine.delta import Delta
from loraplex_router.engine.output import SequenceOutput
from loraplex_router.text.tokenizer import Tokenizer
from loraplex_router.vocabulary.sequence import Alternatives, FinishReason, Sample

LOWEST = -9999.0  # OpenAI's value for impossible tokens, because JSON has no -Inf


class TokenNames:
    """Tokens' names in logprobs: the text or, as_ids, `token_id:` and the id. A token that is a part of a character is
    written as by OpenAI: `\\xe2\\x82`, with `bytes:` before it in completions."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool, before_bytes: str = "") -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._before_bytes = before_bytes

    def name(self, token: int) -> str:
        if self._as_ids:
            return f"token_id:{token}"
        if partial := self._tokenizer.partial_bytes(token):
            return self._before_bytes + "".join(f"\\x{byte:02x}" for byte in partial)
        return self._tokenizer.token_text(token)

    def bytes(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token)


def chat_logprobs(delta: Delta, names: TokenNames) -> dict[str, Any]:
    """Each token's entry is already JSON: hundreds of thousands of objects that live together would be walked through
    by each garbage collection, which stops all streams."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": names.name(token), "logprob": _clamp(logprob), "bytes": list(names.bytes(token))}

    return {
        "content": [
            orjson.Fragment(
                orjson.dumps(
                    {
                        **entry(sample.token, sample.logprob),
                        "top_logprobs": [entry(*pair) for pair in sample.alternatives],
                    }
                )
            )
            for sample, _ in _with_text(delta)
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """The four lists of a completion's choice, whole or in pieces."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._prompt: list[tuple[int, float | None, dict[str, float] | None]] = []
        self._pieces: list[str] = []
        self._echoed = self._at = 0  # characters of the prompt, and of the answer so far

    def add_prompt(self, output: SequenceOutput, pieces: list[str]) -> None:
        """The prompt comes first; each of its tokens has a piece of text."""
        self._pieces = pieces
        first, *others = output.sequence.tokens[: output.sequence.prompt_length]
        self._prompt.append((first, None, None))
        for token, logprob, alternatives in _scored_prompt(others, output):
            self._prompt.append((token, _clamp(logprob), self._top(token, logprob, alternatives)))

    def take(self, delta: Delta) -> dict[str, Any]:
        tokens: list[str] = []
        logprobs: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for (token, logprob, alternatives), piece in zip(self._prompt, self._pieces, strict=True):
            tokens.append(self._names.name(token))
            logprobs.append(logprob)
            top.append(alternatives)
            offsets.append(self._echoed)
            self._echoed += len(piece)
        self._prompt, self._pieces = [], []
        for sample, end in _with_text(delta):
            tokens.append(self._names.name(sample.token))
            logprobs.append(_clamp(sample.logprob))
            top.append(self._top(*sample))
            offsets.append(self._echoed + self._at)
            self._at = end
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

    def _top(self, token: int, logprob: float | None, alternatives: Alternatives) -> dict[str, float]:
        """The alternatives, best first, and the token itself. For tokens with the same name, the best."""
        found = dict[str, float]()
        for other, value in (*alternatives, (token, logprob)):
            found.setdefault(self._names.name(other), _clamp(value))
        return found


def prompt_logprobs(output: SequenceOutput, tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """As in vLLM: each of the prompt's tokens, followed by its alternatives, with their ranks."""

    def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": _clamp(logprob), "rank": rank, "decoded_token": tokenizer.token_text(token)}

    found: list[dict[str, Any] | None] = [None]
    tokens = output.sequence.tokens[1 : output.sequence.prompt_length]
    for rank, (token, logprob, alternatives) in zip(output.prompt_ranks, _scored_prompt(tokens, output), strict=True):
        ranked = {str(other): entry(other, value, place) for place, (other, value) in enumerate(alternatives, 1)}
        found.append({str(token): entry(token, logprob, rank), **ranked})
    return found


def _scored_prompt(tokens: Sequence[int], output: SequenceOutput) -> Iterator[tuple[int, float, Alternatives]]:
    """The prompt's tokens except the first, with their logprobs and alternatives."""
    return zip(tokens, output.prompt_logprobs, output.prompt_alternatives, strict=True)


def _with_text(delta: Delta) -> Iterator[tuple[Sample, int]]:
    """The tokens with text, each with the length of the whole text up to its end."""
    samples = list(zip(delta.samples, delta.ends, strict=True))
    yield from samples[:-1] if delta.finish_reason is FinishReason.END_TOKEN else samples


def _clamp(logprob: float | None) -> float:
    return max(LOWEST if logprob is None else logprob, LOWEST)
