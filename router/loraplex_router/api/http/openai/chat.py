"""/v1/chat/completions: an answer to a conversation."""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from loraplex_router.api.http.conversation import read_conversation
from loraplex_router.api.http.openai.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from loraplex_router.api.http.openai.reading import read_adapters, read_model, read_most, read_options
from loraplex_router.api.http.openai.schema import ChatCompletionRequest
from loraplex_router.api.http.openai.tools import check_tools, create_reader, may_call, write_call
from loraplex_router.api.http.openai.writing import (
    FINISH_REASONS,
    common_fields,
    prompt_token_ids,
    token_ids,
    usage,
    usage_so_far,
    whose,
    write_reasoning,
)
from loraplex_router.api.http.sse import DONE, event
from loraplex_router.api.readers import Deltas
from loraplex_router.api.turns import in_turn
from loraplex_router.engine.delta import Delta
from loraplex_router.engine.generation import Generation
from loraplex_router.engine.output import SequenceOutput
from loraplex_router.text.reasoning import Reasoning
from loraplex_router.text.tokenizer import Tokenizer
from loraplex_router.text.tool_calls import Arguments, Piece, ToolCall
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.request import Request
from loraplex_router.vocabulary.sampling import Sampling
from loraplex_router.vocabulary.sequence import Detail
from loraplex_router.vocabulary.thoughts import Thoughts
from loraplex_router.vocabulary.violations import Violations


def read_chat(body: ChatCompletionRequest, base: Sequence[str], defaults: Sampling, request_id: str) -> Request:
    """`request_id` is the headers'. Raises InvalidRequestError, and AdapterNotFoundError for an empty adapter name."""
    found = Violations()
    found.check(body.logprobs or not body.top_logprobs, "top_logprobs", "needs logprobs to be true")
    found.check(body.max_completion_tokens != 0, "max_completion_tokens", "must be at least 1, or absent")
    check_tools(body, found)
    chat = read_conversation(body, found)
    found.raise_any()
    return Request(
        prompt=chat if may_call(body) else replace(chat, tools=()),
        request_id=body.request_id or request_id,
        adapter=read_model(body, base),
        adapters=read_adapters(body, base),
        max_new_tokens=read_most(body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens),
        n=body.n or 1,
        detail=Detail(
            bool(body.logprobs), body.top_logprobs or 0, body.prompt_logprobs is not None, body.prompt_logprobs or 0
        ),
        separates_thoughts=True,
        **read_options(body, defaults),
    )


@dataclass(frozen=True, slots=True)
class ChatWriter:
    """Writes the answers of a chat completion's generations: one for each adapter."""

    body: ChatCompletionRequest
    generations: Sequence[Generation]
    tokenizer_of: Callable[[Adapter], Tokenizer]
    version: str

    def whole(self, answers: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        deltas = [delta for answer in answers for delta in answer]
        given = zip(range(len(deltas)), self._answers(), deltas, strict=True)
        choices = [self._whole_choice(index, *answer, delta) for index, answer, delta in given]
        first = {**self._common_fields("chat.completion"), **prompt_token_ids(self._answers()[0][1], self.body)}
        if self.body.prompt_logprobs is not None:
            output = self._answers()[0][1]
            first["prompt_logprobs"] = prompt_logprobs(output, self.tokenizer_of(output.sequence.adapter))
        return {**first, "choices": choices, "usage": usage(self.generations)}

    def _answers(self) -> list[tuple[Generation, SequenceOutput]]:
        """By the choices' indexes."""
        return [(generation, output) for generation in self.generations for output in generation.outputs]

    def _whole_choice(self, index: int, generation: Generation, output: SequenceOutput, delta: Delta) -> dict[str, Any]:
        writer = self._choice_writer(output)
        content, thoughts, calls = "", "", list[dict[str, Any]]()
        for piece in writer.pieces(delta):
            match piece:
                case Reasoning():
                    thoughts += piece.text
                case ToolCall():
                    calls.append(write_call(piece.name, output.new_id(writer.calls)))
                case Arguments():
                    calls[-1]["function"]["arguments"] += piece.text
                case _:
                    content += piece
        silent = not content and (calls or thoughts)
        message: dict[str, Any] = {"role": "assistant", "content": None if silent else content}
        if thoughts:
            message |= write_reasoning(thoughts)
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(output, delta) if self.body.logprobs else None,
            "finish_reason": writer.finish_reason(delta),
            "stop_reason": output.stop_reason,
            **token_ids(delta, self.body),
            **whose(generation, self.body),
        }
        if calls:
            message |= {"function_call": calls[0]["function"]} if self.body.functions else {"tool_calls": calls}
        return choice

    async def events(self, deltas: Deltas) -> AsyncIterator[bytes]:
        with_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        first = self._common_fields("chat.completion.chunk")
        answers = self._answers()
        writers = [self._choice_writer(output) for _, output in answers]
        async for index, delta in deltas:
            last = usage_so_far(self.body.stream_options, self.generations)
            write = partial(self._events, {**first, **last}, index, *answers[index], writers[index], delta)
            yield await in_turn(delta.num_logprobs, write)
        if with_usage:
            yield event({**first, "choices": [], "usage": usage(self.generations)})
        yield DONE

    def _events(
        self,
        first: dict[str, Any],
        index: int,
        generation: Generation,
        output: SequenceOutput,
        writer: "_ChoiceWriter",
        delta: Delta,
    ) -> bytes:
        own = {"index": index, **whose(generation, self.body)}
        prompt = {} if writer.begun else prompt_token_ids(output, self.body)
        events = list[bytes]()
        for choice in self._chunks(own, output, writer, delta):
            events.append(event({**first, **prompt, "choices": [choice]}))
            prompt = {}
        return b"".join(events)

    def _chunks(
        self, own: dict[str, Any], output: SequenceOutput, writer: "_ChoiceWriter", delta: Delta
    ) -> Iterator[dict[str, Any]]:
        """The first chunk has the role, and the last one the finish reason; a delta's logprobs and token ids are in its
        first chunk."""
        nothing: dict[str, Any] = {"logprobs": None}
        tokens = nothing
        if delta.samples:
            logprobs = self._logprobs(output, delta) if self.body.logprobs else None
            tokens = {"logprobs": logprobs, **token_ids(delta, self.body)}

        def chunk(content: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            ended = {"finish_reason": reason, "stop_reason": output.stop_reason if reason else None}
            return {**own, "delta": content, **tokens, **ended}

        if not writer.begun:
            writer.begun = True
            yield {
                **own,
                "delta": {"role": "assistant", "content": ""},
                **nothing,
                "finish_reason": None,
                "stop_reason": None,
            }
        for piece in writer.pieces(delta):
            match piece:
                case Reasoning():
                    yield chunk(write_reasoning(piece.text))
                case ToolCall():
                    call = write_call(piece.name, output.new_id(writer.calls))
                    yield chunk(self._part_of_call(writer, call))
                case Arguments():
                    yield chunk(self._part_of_call(writer, {"function": {"arguments": piece.text}}))
                case _:
                    yield chunk({"content": piece})
            tokens = nothing
        if delta.finish_reason or any(tokens.values()):
            yield chunk({}, writer.finish_reason(delta))

    def _part_of_call(self, writer: "_ChoiceWriter", part: dict[str, Any]) -> dict[str, Any]:
        if self.body.functions:
            return {"function_call": part["function"]}
        return {"tool_calls": [{"index": writer.calls - 1, **part}]}

    def _choice_writer(self, output: SequenceOutput) -> "_ChoiceWriter":
        return _ChoiceWriter(self.body, output.thoughts)

    def _logprobs(self, output: SequenceOutput, delta: Delta) -> dict[str, Any]:
        tokenizer = self.tokenizer_of(output.sequence.adapter)
        return chat_logprobs(delta, TokenNames(tokenizer, bool(self.body.return_tokens_as_token_ids)))

    def _common_fields(self, kind: str) -> dict[str, Any]:
        return common_fields(kind, "chatcmpl", self.generations[0], self.body.model, self.version)


class _ChoiceWriter:
    """What has been found in one choice's text."""

    def __init__(self, body: ChatCompletionRequest, thoughts: Thoughts | None) -> None:
        self._reader = create_reader(body, thoughts)
        self._hides_reasoning = body.include_reasoning is False
        self._reason_of_calls = "function_call" if body.functions else "tool_calls"
        self.begun = False

    @property
    def calls(self) -> int:
        """The number of calls shown."""
        return self._reader.calls

    def pieces(self, delta: Delta) -> Iterator[Piece | Reasoning]:
        for piece in self._reader.pieces(delta):
            if not (self._hides_reasoning and isinstance(piece, Reasoning)):
                yield piece

    def finish_reason(self, delta: Delta) -> str | None:
        reason = FINISH_REASONS[delta.finish_reason]
        return self._reason_of_calls if reason == "stop" and self.calls else reason
