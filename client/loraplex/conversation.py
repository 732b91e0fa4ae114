"""Conversations: they remember what was said, and call the functions that the model asks for."""

import inspect
import secrets
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Self, Unpack

from loraplex.blocking import Blocking, blocking, blocking_stream
from loraplex.calls import Calls
from loraplex.client import Client
from loraplex.options import GenerateOptions, Message
from loraplex.structured import AnswerError
from loraplex.tools import read_tools, write_result
from loraplex.types import FinishReason, GeneratedSequence, Generation, StreamPiece, ToolCall
from loraplex_protos.errors import LoraplexError

MOST_ROUNDS = 8
FOR_ONE_REQUEST = {"n", "adapters", "request_id"}
CUT_OFF = FinishReason.LENGTH, FinishReason.CANCELLED


class TooManyRoundsError(LoraplexError):
    """The model calls tools again and again instead of answering."""

    error_type = "too_many_rounds"


class AsyncConversation:
    """`Conversation` for an AsyncClient: the same methods, but awaitable. Its tools may be coroutine functions; others
    run in threads."""

    def __init__(
        self,
        client: Calls,
        messages: Iterable[Message] = (),
        *,
        max_rounds: int = MOST_ROUNDS,
        **options: Unpack[GenerateOptions],
    ) -> None:
        """See `Conversation`."""
        if wrong := FOR_ONE_REQUEST & options.keys():
            raise TypeError(f"not an option of a conversation: {', '.join(sorted(wrong))}")
        if not isinstance(max_rounds, int) or max_rounds < 1:
            raise ValueError("max_rounds must be a whole number, at least 1")
        self.messages = list(messages)
        self._client = client
        self._max_rounds = max_rounds
        self._options: GenerateOptions = {"session": secrets.token_hex(8), "reasoning": True, **options}
        self._tools = {tool.name: tool for tool in read_tools(options.get("tools") or ())}
        for tool in self._tools.values():
            if tool.function is None:
                raise TypeError(f"the tool {tool.name} has no function to call")

    def fork(self) -> Self:
        """Another conversation that begins with what was said in this one."""
        other = copy(self)
        other.messages = list(self.messages)
        return other

    async def say(self, text: str, *, timeout: float | None = None) -> Generation:
        """Adds a message of the user, and returns the answer to it. While the model calls tools instead, it gets their
        results and is asked again. `timeout` is for each time.

        Raises AnswerError if the model was cut off within a call, and TooManyRoundsError if it has not answered when it
        was asked `max_rounds` times. After an error, the conversation is as before.
        """
        turn = self._begin(text)
        for options in self._rounds():
            generation = await self._client.generate(turn, timeout=timeout, **options)
            if await self._ends(turn, generation.sequences[0]):
                return generation
        raise self._too_many()

    async def stream(self, text: str, *, timeout: float | None = None) -> AsyncGenerator[StreamPiece, None]:
        """Yields what `say` makes the model generate, including its calls, as it is generated. If the stream is left
        early, the conversation is as before."""
        turn = self._begin(text)
        for options in self._rounds():
            pieces = list[StreamPiece]()
            async with aclosing(self._client.stream(turn, timeout=timeout, **options)) as stream:
                async for piece in stream:
                    pieces.append(piece)
                    yield piece
            if await self._ends(turn, _join(pieces)):
                return
        raise self._too_many()

    def _begin(self, text: str) -> list[Message]:
        return [*self.messages, {"role": "user", "content": text}]

    def _rounds(self) -> Iterator[GenerateOptions]:
        """The options of each time that the model is asked. Only the first answer is forced to call."""
        yield self._options
        later = self._options.copy()
        if later.get("tool_choice") != "none":
            later["tool_choice"] = "auto"
        yield from repeat(later, self._max_rounds - 1)

    async def _ends(self, turn: list[Message], answer: GeneratedSequence) -> bool:
        """Adds an answer to the turn, with the results of its calls. If it makes none, the turn is over."""
        turn.append(_message(answer))
        calls = answer.tool_calls
        if not calls:
            self.messages = turn
            return True
        if answer.finish_reason in CUT_OFF:
            reason = f"the answer was cut off while it called tools (finish reason {answer.finish_reason.value})"
            raise AnswerError(reason, answer.text, answer.finish_reason)
        results = await self._client._waiting.all_of(
            [partial(self._tools[call.name].call, call.arguments) for call in calls]
        )
        for call, result in zip(calls, results, strict=True):
            content = write_result(result)
            turn.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content})
        return False

    def _too_many(self) -> TooManyRoundsError:
        return TooManyRoundsError(f"the model called tools {self._max_rounds} times without an answer")


class Conversation(Blocking[AsyncConversation]):
    """What was said, and what is said next.

        def weather(city: str) -> str:
            \"\"\"The weather in a city.\"\"\"
            return "sunny"

        conversation = Conversation(client, adapter="travel", tools=[weather])
        print(conversation.say("Do I need an umbrella in Rome?").text)

    Functions in `tools` are called with the arguments that the model gives; several calls of one answer run at the same
    time, in threads. Of an exception that a function raises, the model gets the type and the text. All requests have
    the same `session`, so that an alias with weights always leads to the same adapter.
    """

    def __init__(
        self,
        client: Client,
        messages: Iterable[Message] = (),
        *,
        max_rounds: int = MOST_ROUNDS,
        **options: Unpack[GenerateOptions],
    ) -> None:
        """`messages` come first, such as {"role": "system", ...}. `max_rounds` is how often the model is asked, at
        most, until it answers instead of calling tools. The other options are those of `generate` for one answer.
        Raises TypeError for an option or a tool that does not fit, ValueError for a wrong number."""
        for tool in read_tools(options.get("tools") or ()):
            if inspect.iscoroutinefunction(tool.function):
                raise TypeError(f"the tool {tool.name} is a coroutine function: use AsyncConversation")
        super().__init__(AsyncConversation(client._coroutines, messages, max_rounds=max_rounds, **options))

    @property
    def messages(self) -> list[Message]:
        """What was said, with calls and their results."""
        return self._coroutines.messages

    def fork(self) -> Self:
        """Another conversation that begins with what was said in this one."""
        other = copy(self)
        other._coroutines = self._coroutines.fork()
        return other

    say = blocking(AsyncConversation.say)
    stream = blocking_stream(AsyncConversation.stream)


def _message(answer: GeneratedSequence) -> Message:
    message: dict[str, object] = {"role": "assistant", "content": answer.text}
    if answer.reasoning:
        message["reasoning"] = answer.reasoning
    if answer.tool_calls:
        message["tool_calls"] = answer.tool_calls
    return message


def _join(pieces: Sequence[StreamPiece]) -> GeneratedSequence:
    calls = list[ToolCall]()
    for part in (part for piece in pieces for part in piece.tool_calls):
        if part.index == len(calls):
            calls.append(ToolCall(part.id, part.name, ""))
        calls[part.index] = replace(calls[part.index], arguments=calls[part.index].arguments + part.arguments)
    last = pieces[-1]
    assert last.finish_reason and last.usage
    return GeneratedSequence(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(token for piece in pieces for token in piece.tokens),
        finish_reason=last.finish_reason,
        usage=last.usage,
        seed=last.seed,
        adapter=last.adapter,
        reasoning="".join(piece.reasoning for piece in pieces),
        tool_calls=tuple(calls),
    )
