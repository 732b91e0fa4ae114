"""Writes a response, whole or as OpenAI's events: a whole one is what the last event has."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

from loraplex_protos.errors import LoraplexError
from loraplex_router.api.http.errors import describe
from loraplex_router.api.http.openai.logprobs import TokenNames, chat_logprobs
from loraplex_router.api.http.openai.responses.schema import PREFIXES, ResponsesBody
from loraplex_router.api.http.openai.responses.tools import calls_by_function, custom_input
from loraplex_router.api.http.openai.schema import ChatCompletionRequest
from loraplex_router.api.http.openai.tools import create_reader
from loraplex_router.api.http.sse import named_event
from loraplex_router.api.readers import Deltas
from loraplex_router.api.turns import in_turn
from loraplex_router.engine.delta import Delta
from loraplex_router.engine.generation import Generation
from loraplex_router.text.reasoning import Reasoning
from loraplex_router.text.tokenizer import Tokenizer
from loraplex_router.text.tool_calls import Arguments, ToolCall
from loraplex_router.vocabulary.sequence import FinishReason

Event = dict[str, Any]
TEXTS = {
    "message": "output_text",
    "reasoning": "reasoning_text",
    "function_call": "function_call_arguments",
    "custom_tool_call": "custom_tool_call_input",
}
CALLS = {"function_call": "arguments", "custom_tool_call": "input"}  # type -> what the tool gets


class ResponseWriter:
    """Writes one response, once. `chat` is the same request for chat completions; `model`: its name in the answer;
    `keep` takes the whole response, if it is to be kept."""

    def __init__(
        self,
        body: ResponsesBody,
        chat: ChatCompletionRequest,
        generation: Generation,
        model: str,
        tokenizer: Tokenizer,
        keep: Callable[[Event], None] | None,
    ) -> None:
        self._generation = generation
        (self._output,) = generation.outputs
        self._calls = calls_by_function(body)
        self._reader = create_reader(chat, self._output.thoughts)
        self._hides_reasoning = chat.include_reasoning is False
        self._names = TokenNames(tokenizer, False) if chat.logprobs else None
        self._number = 0  # of the next event
        self._items = list[dict[str, Any]]()  # the finished ones
        self._item: dict[str, Any] | None = None  # the one that grows; its text is still in `_pieces`
        self._pieces = list[str]()
        self._logprobs = list[Any]()  # of the text that grows
        self._begun = False
        self._keep = keep
        self._response = _describe(body, generation, model, stored=keep is not None)

    def whole(self, delta: Delta) -> dict[str, Any]:
        *_, last = self._events(delta)
        found: dict[str, Any] = last["response"]
        return found

    async def events(self, deltas: Deltas) -> AsyncIterator[bytes]:
        async for _, delta in deltas:
            yield await in_turn(delta.num_logprobs, partial(self._write, delta))

    def failed(self, error: LoraplexError) -> Event:
        """The last event of a stream that ends with an error."""
        code = "rate_limit_exceeded" if error.http_status == 429 else "server_error"
        return self._of_response("failed", error={"code": code, "message": describe(error)})

    def _write(self, delta: Delta) -> bytes:
        return b"".join(map(named_event, self._events(delta)))

    def _events(self, delta: Delta) -> Iterator[Event]:
        if not self._begun:
            self._begun = True
            yield self._of_response("created", "in_progress")
            yield self._of_response("in_progress")
        logprobs = chat_logprobs(delta, self._names)["content"] if self._names else []
        for piece in self._reader.pieces(delta):
            own: dict[str, Any] = {}
            match piece:
                case ToolCall():
                    yield from self._begin(_call(self._calls[piece.name], self._new_id()))
                    continue
                case Arguments():
                    text = piece.text
                case Reasoning():
                    if self._hides_reasoning:
                        continue
                    if self._item is None:
                        yield from self._begin(_thoughts(self._new_id()))
                    text, own = piece.text, {"content_index": 0}
                case _:
                    if self._item is None or self._item["type"] != "message":
                        yield from self._begin(_message(self._new_id()))
                    text, own = piece, {"content_index": 0, "logprobs": logprobs}
                    self._logprobs += logprobs
                    logprobs = []
            self._pieces.append(text)
            assert self._item is not None
            if self._item["type"] == "custom_tool_call":  # its input is known when its arguments are whole
                continue
            yield self._of_item(f"response.{TEXTS[self._item['type']]}.delta", delta=text, **own)
        if delta.finish_reason:
            if not self._items and self._item is None:
                yield from self._begin(_message(self._new_id()))
            if delta.finish_reason is FinishReason.LENGTH:
                yield from self._finish("incomplete")
                details = {"reason": "max_output_tokens"}
                last = self._of_response("incomplete", incomplete_details=details, usage=self._usage())
            else:
                yield from self._finish("completed")
                last = self._of_response("completed", completed_at=int(time.time()), usage=self._usage())
            if self._keep:
                self._keep(last["response"])
            yield last

    def _new_id(self) -> str:
        """For the next item."""
        return self._output.new_id(len(self._items) + (self._item is not None))

    def _begin(self, item: dict[str, Any]) -> Iterator[Event]:
        yield from self._finish("completed")
        self._item = item
        yield self._of_output("added", item)
        if item["type"] not in CALLS:
            yield self._of_item("response.content_part.added", content_index=0, part=_part(item, "", []))

    def _finish(self, status: str) -> Iterator[Event]:
        """Ends the item that grows, if there is one."""
        if self._item is None:
            return
        text, item = "".join(self._pieces), {**self._item, "status": status}
        kind = f"response.{TEXTS[item['type']]}.done"
        if item["type"] == "custom_tool_call":
            item["input"] = custom_input(text)
            yield self._of_item(f"response.{TEXTS[item['type']]}.delta", delta=item["input"])
            yield self._of_item(kind, input=item["input"])
        elif item["type"] == "function_call":
            item["arguments"] = text
            yield self._of_item(kind, arguments=text, name=item["name"])
        else:
            part = _part(item, text, self._logprobs)
            item["content"] = [part]
            own = {"logprobs": self._logprobs} if item["type"] == "message" else {}
            yield self._of_item(kind, content_index=0, text=text, **own)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        yield self._of_output("done", item)
        self._items.append(item)
        self._item, self._pieces, self._logprobs = None, [], []

    # ---- events by what they are about -----------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _of_item(self, kind: str, **fields: Any) -> Event:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=len(self._items), **fields)

    def _of_output(self, kind: str, item: dict[str, Any]) -> Event:
        return self._event(f"response.output_item.{kind}", output_index=len(self._items), item=item)

    def _of_response(self, kind: str, status: str = "", **fields: Any) -> Event:
        response = {**self._response, "status": status or kind, "output": self._items, **fields}
        return self._event(f"response.{kind}", response=response)

    def _usage(self) -> dict[str, Any]:
        sequence, generated = self._output.sequence, self._output.generated
        return {
            "input_tokens": sequence.prompt_length,
            "input_tokens_details": {"cached_tokens": sequence.prefix_hit, "cache_write_tokens": 0},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": sequence.prompt_length + generated,
        }


def _describe(body: ResponsesBody, generation: Generation, model: str, stored: bool) -> dict[str, Any]:
    """What is known before the answer: the request's own fields, with the values that they have."""
    sampling = generation.outputs[0].sequence.sampling
    sent = body.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {
        "id": f"resp_{generation.outputs[0].new_id('response')}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
        "store": stored,
        "temperature": sampling.temperature,
        "text": {"format": {"type": "text"}, **sent.get("text", {})},
        "tool_choice": sent.get("tool_choice", "auto"),
        "tools": [{"strict": None, "parameters": None, **tool} for tool in sent.get("tools", ())],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
        "background": False,
    }


def _message(id: str) -> dict[str, Any]:
    """A message whose text has not arrived yet."""
    return {
        "id": f"msg_{id}",
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }


def _call(shown: dict[str, Any], id: str) -> dict[str, Any]:
    """A call whose arguments have not arrived yet. `shown`: its type and names."""
    ids = {"id": f"{PREFIXES[shown['type']]}_{id}", "call_id": f"call_{id}"}
    return {**ids, **shown, "status": "in_progress", CALLS[shown["type"]]: ""}


def _thoughts(id: str) -> dict[str, Any]:
    """Reasoning whose text has not arrived yet."""
    return {
        "id": f"rs_{id}",
        "type": "reasoning",
        "status": "in_progress",
        "summary": [],
        "content": [],
    }


def _part(item: dict[str, Any], text: str, logprobs: list[Any]) -> dict[str, Any]:
    kind = {"type": TEXTS[item["type"]], "text": text}
    return {**kind, "annotations": [], "logprobs": logprobs} if item["type"] == "message" else kind
