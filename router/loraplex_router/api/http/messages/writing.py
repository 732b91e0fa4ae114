"""Writes an answer of /v1/messages, whole or as Anthropic's events."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

from pydantic_core import from_json

from loraplex_router.api.http.messages.reading import create_reader
from loraplex_router.api.http.messages.schema import MessagesBody
from loraplex_router.api.http.sse import named_event
from loraplex_router.api.readers import Deltas
from loraplex_router.engine.delta import Delta
from loraplex_router.engine.generation import Generation
from loraplex_router.text.reasoning import Reasoning
from loraplex_router.text.tool_calls import Arguments, ToolCall
from loraplex_router.vocabulary.sequence import FinishReason

PING = {"type": "ping"}

Event = dict[str, Any]


class MessageWriter:
    """Writes one answer, once. `model`: its name there."""

    def __init__(self, body: MessagesBody, generation: Generation, model: str) -> None:
        self._generation = generation
        (self._output,) = generation.outputs
        self._model = model
        self._most = body.max_tokens
        self._reader = create_reader(body, self._output.thoughts)
        self._block = -1  # the index of the last content block
        self._open = ""  # its type, while it is open
        self._begun = False
        self._hides_thoughts = body.thinking is not None and body.thinking.display == "omitted"

    def whole(self, delta: Delta) -> dict[str, Any]:
        content = list[dict[str, Any]]()
        arguments = list[str]()  # of the calls in `content`, in order
        for piece in self._reader.pieces(delta):
            match piece:
                case ToolCall():
                    content.append(_tool_use(piece.name, self._output.new_id(len(content))))
                    arguments.append("")
                case Arguments():
                    arguments[-1] += piece.text
                case Reasoning():
                    if not content or content[-1]["type"] != "thinking":
                        content.append(_thinking())
                    content[-1]["thinking"] += "" if self._hides_thoughts else piece.text
                case _:
                    if not content or content[-1]["type"] != "text":
                        content.append({"type": "text", "text": ""})
                    content[-1]["text"] += piece
        calls = (block for block in content if block["type"] == "tool_use")
        for block, text in zip(calls, arguments, strict=True):
            block["input"] = _read_arguments(text)
        return {**self._message(), "content": content, **self._ending(delta)}

    async def events(self, deltas: Deltas) -> AsyncIterator[bytes]:
        async for _, delta in deltas:
            yield b"".join(map(named_event, self._events(delta)))

    def _events(self, delta: Delta) -> Iterator[Event]:
        if not self._begun:
            self._begun = True
            yield {"type": "message_start", "message": self._message()}
            yield PING
        for piece in self._reader.pieces(delta):
            match piece:
                case ToolCall():
                    yield from self._open_block(_tool_use(piece.name, self._output.new_id(self._block)))
                case Arguments():
                    yield self._block_delta({"type": "input_json_delta", "partial_json": piece.text})
                case Reasoning():
                    if self._open != "thinking":
                        yield from self._open_block(_thinking())
                    if not self._hides_thoughts:
                        yield self._block_delta({"type": "thinking_delta", "thinking": piece.text})
                case _:
                    if self._open != "text":
                        yield from self._open_block({"type": "text", "text": ""})
                    yield self._block_delta({"type": "text_delta", "text": piece})
        if delta.finish_reason:
            yield from self._close_block()
            yield {"type": "message_delta", "delta": self._ending(delta), "usage": self._usage()}
            yield {"type": "message_stop"}

    def _open_block(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self._close_block()
        self._block, self._open = self._block + 1, block["type"]
        yield {"type": "content_block_start", "index": self._block, "content_block": block}

    def _block_delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._block, "delta": delta}

    def _close_block(self) -> Iterator[Event]:
        if self._open:
            self._open = ""
            yield {"type": "content_block_stop", "index": self._block}

    def _message(self) -> dict[str, Any]:
        return {
            "id": f"msg_{self._generation.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, int]:
        sequence = self._output.sequence
        return {
            "input_tokens": sequence.prompt_length - sequence.prefix_hit,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": sequence.prefix_hit,
            "output_tokens": self._output.generated,
        }

    def _ending(self, delta: Delta) -> dict[str, str | None]:
        """Why the answer ended."""
        found = self._output.stop_reason
        if delta.finish_reason is FinishReason.LENGTH:
            full = self._output.generated < self._most
            return {"stop_reason": "model_context_window_exceeded" if full else "max_tokens", "stop_sequence": None}
        if isinstance(found, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": found}
        return {"stop_reason": "tool_use" if self._reader.calls else "end_turn", "stop_sequence": None}


def _thinking() -> dict[str, Any]:
    """Thoughts that have not arrived yet. Nothing is signed."""
    return {"type": "thinking", "thinking": "", "signature": ""}


def _tool_use(name: str, id: str) -> dict[str, Any]:
    """A call whose input has not arrived yet."""
    return {"type": "tool_use", "id": f"toolu_{id}", "name": name, "input": {}}


def _read_arguments(text: str) -> dict[str, Any]:
    """A call's input. It may be cut off, and is then as Anthropic's clients read the end of such a stream. What is not
    JSON stays visible, so that no tool runs with less than the model wrote."""
    try:
        found = from_json(text or "{}", allow_partial=True)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"malformed_json": text}
