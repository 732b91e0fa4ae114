"""/v1/completions: the continuation of a text."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from loraplex_router.api.http.fields import read_prompts
from loraplex_router.api.http.openai.logprobs import CompletionLogprobs, TokenNames, prompt_logprobs
from loraplex_router.api.http.openai.reading import (
    read_adapters,
    read_model,
    read_most,
    read_options,
)
from loraplex_router.api.http.openai.schema import CompletionRequest
from loraplex_router.api.http.openai.writing import (
    FINISH_REASONS,
    common_fields,
    prompt_token_ids,
    token_ids,
    usage,
    usage_so_far,
    whose,
)
from loraplex_router.api.http.sse import DONE, event
from loraplex_router.api.readers import Deltas
from loraplex_router.api.turns import in_turn
from loraplex_router.engine.delta import Delta
from loraplex_router.engine.generation import Generation
from loraplex_router.engine.output import SequenceOutput
from loraplex_router.text.tokenizer import Tokenizer
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.request import Prompt, Request
from loraplex_router.vocabulary.sampling import Sampling
from loraplex_router.vocabulary.sequence import Detail, FinishReason
from loraplex_router.vocabulary.violations import Violations

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_PROMPTS = 128


def read_completions(
    body: CompletionRequest, base: Sequence[str], defaults: Sampling, request_id: str
) -> list[Request]:
    """One request for each prompt. `request_id` is the headers'. Raises InvalidRequestError, and AdapterNotFoundError
    for an empty adapter name."""
    prompts = read_prompts(body.prompt, body.add_special_tokens is not False)
    _check(body, prompts)
    options = read_options(body, defaults)
    adapter, adapters = read_model(body, base), read_adapters(body, base)
    scored = body.logprobs is not None or _candidates(body) > (body.n or 1)
    detail = Detail(
        logprobs=scored,
        top_logprobs=body.logprobs or 0,
        prompt_logprobs=body.prompt_logprobs is not None or bool(body.echo and body.logprobs is not None),
        prompt_top_logprobs=max(body.prompt_logprobs or 0, (body.logprobs or 0) if body.echo else 0),
    )
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    request_id = body.request_id or request_id
    numbered = bool(request_id) and len(prompts) > 1
    return [
        Request(
            prompt=prompt,
            suffix=body.suffix or "",
            request_id=f"{request_id}-{place}" if numbered else request_id,
            adapter=adapter,
            adapters=adapters,
            max_new_tokens=1 if _scores_only(body) else read_most(max_tokens),
            n=_candidates(body),
            detail=detail,
            **options,
        )
        for place, prompt in enumerate(prompts)
    ]


def _candidates(body: CompletionRequest) -> int:
    return max(body.best_of or 1, body.n or 1)


def _scores_only(body: CompletionRequest) -> bool:
    """Whether only the prompt and its logprobs are requested. A token is generated anyway, but not shown."""
    return bool(body.echo) and body.max_tokens == 0


def _check(body: CompletionRequest, prompts: Sequence[Prompt]) -> None:
    found = Violations()
    texts = not prompts or not isinstance(prompts[0], tuple)  # all are of one kind
    found.check(not body.suffix or texts, "suffix", "needs a prompt that is a text")
    alone = not (body.echo or body.truncate_prompt_tokens is not None)
    found.check(not body.suffix or alone, "suffix", "cannot be used with echo or truncate_prompt_tokens")
    found.check(0 < len(prompts) <= MAX_PROMPTS, "prompt", f"must be 1 to {MAX_PROMPTS} prompts")
    best_of = body.best_of
    found.check(best_of is None or best_of >= (body.n or 1), "best_of", "must be at least n")
    found.check(not body.stream or best_of in (None, body.n or 1), "best_of", "cannot be used with stream")
    found.check(not (body.stream and _scores_only(body)), "max_tokens", "of 0 cannot be used with stream")
    found.raise_any()


@dataclass(frozen=True, slots=True)
class CompletionWriter:
    """Writes the answers of a completion's generations: one for each prompt and adapter."""

    body: CompletionRequest
    generations: Sequence[Generation]
    tokenizer_of: Callable[[Adapter], Tokenizer]
    version: str

    def whole(self, answers: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for generation, deltas in zip(self.generations, answers, strict=True):
            pairs = list(zip(generation.outputs, deltas, strict=True))
            if len(pairs) > (self.body.n or 1):
                pairs = sorted(pairs, key=lambda pair: pair[1].mean_logprob, reverse=True)[: self.body.n or 1]
            own = whose(generation, self.body)
            choices += [{**self._whole_choice(len(choices) + at, *pair), **own} for at, pair in enumerate(pairs)]
        return {**self._common_fields(), "choices": choices, "usage": usage(self.generations)}

    def _whole_choice(self, index: int, output: SequenceOutput, delta: Delta) -> dict[str, Any]:
        if _scores_only(self.body):
            delta = Delta(finish_reason=FinishReason.LENGTH)
        choice = _ChoiceWriter(self, index, output).write(delta)
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output, self.tokenizer_of(output.sequence.adapter))
        return choice

    async def events(self, deltas: Deltas) -> AsyncIterator[bytes]:
        answers = [(generation, output) for generation in self.generations for output in generation.outputs]
        writers = [_ChoiceWriter(self, index, output) for index, (_, output) in enumerate(answers)]
        with_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        first = self._common_fields()
        async for index, delta in deltas:
            writer, (generation, output) = writers[index], answers[index]
            prompt = 0 if writer.begun else output.num_prompt_logprobs
            if writer.has_news(delta):
                last = usage_so_far(self.body.stream_options, self.generations)
                write = partial(_event, first, writer, delta, whose(generation, self.body), last)
                yield await in_turn(delta.num_logprobs + prompt, write)
        if with_usage:
            yield event({**first, "choices": [], "usage": usage(self.generations)})
        yield DONE

    def _common_fields(self) -> dict[str, Any]:
        return common_fields("text_completion", "cmpl", self.generations[0], self.body.model, self.version)


def _event(
    first: dict[str, Any], writer: "_ChoiceWriter", delta: Delta, own: dict[str, str | None], last: dict[str, Any]
) -> bytes:
    return event({**first, "choices": [{**writer.write(delta), **own}], **last})


class _ChoiceWriter:
    """Writes one choice, whole or in pieces. With `echo`, the first piece begins with the prompt."""

    def __init__(self, parent: CompletionWriter, index: int, output: SequenceOutput) -> None:
        tokenizer = parent.tokenizer_of(output.sequence.adapter)
        self._index, self._output, self._tokenizer = index, output, tokenizer
        self._body, self._echo = parent.body, bool(parent.body.echo)
        self._shows_special_tokens = parent.body.skip_special_tokens is False
        self._decoder = tokenizer.verbatim if self._shows_special_tokens else tokenizer
        names = TokenNames(tokenizer, bool(parent.body.return_tokens_as_token_ids), "bytes:")
        self._logprobs = CompletionLogprobs(names) if parent.body.logprobs is not None else None
        self.begun = False

    def has_news(self, delta: Delta) -> bool:
        """Whether a stream must send it."""
        shown = self._logprobs or self._body.return_token_ids
        return not self.begun or bool(delta.text or delta.finish_reason or (shown and delta.samples))

    def write(self, delta: Delta) -> dict[str, Any]:
        text, logprobs = delta.text, None
        ids = token_ids(delta, self._body) | ({} if self.begun else prompt_token_ids(self._output, self._body))
        if self._echo and not self.begun:
            prompt = self._output.sequence.tokens[: self._output.sequence.prompt_length]
            text = self._decoder.decode(prompt) + text
            if self._logprobs:
                self._logprobs.add_prompt(self._output, self._tokenizer.token_texts(prompt, self._shows_special_tokens))
        self.begun = True
        if self._logprobs:
            logprobs = self._logprobs.take(delta)
        reason = FINISH_REASONS[delta.finish_reason]
        choice = {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**choice, **ids, "stop_reason": self._output.stop_reason if reason else None}
