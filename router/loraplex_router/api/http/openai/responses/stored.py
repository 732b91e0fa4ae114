"""Responses that are kept, with what they answered, so that later ones continue them."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from loraplex_protos.errors import FieldViolation, InvalidRequestError, ResponseNotFoundError, quote
from loraplex_router.api.http.fields import MAX_MESSAGES
from loraplex_router.api.http.openai.responses.schema import PREFIXES, Item, ResponsesBody
from loraplex_router.service.response_store import ResponseStore
from loraplex_router.vocabulary.violations import Violations

MOST_BYTES = 8 << 20  # of a conversation that is continued, or of items that are referred to
REFERENCE = "item_reference"
RESPONSE = "resp_"  # how ids of responses begin; others are of items
HINT = "Responses are kept in the memory of one router, for a day at most and within limits: send the items as input"

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StoredResponses:
    """Those of one tenant."""

    store: ResponseStore
    tenant: str

    def keep(self, body: ResponsesBody, response: Row) -> None:
        """Keeps an answer with the input that is new in its request, and its items by their own ids."""
        kept = {"response": response, "input": _input_items(body)}
        self.store.put(self.tenant, response["id"], orjson.dumps(kept))
        for item in response["output"]:
            self.store.put(self.tenant, item["id"], orjson.dumps(item))

    def with_items(self, body: ResponsesBody) -> ResponsesBody:
        """The body with items in place of references to them. Raises InvalidRequestError."""
        if isinstance(body.input, str) or all(item.type != REFERENCE for item in body.input):
            return body
        found, items, size = Violations(), list[Item](), 0
        for place, item in enumerate(body.input):
            if item.type != REFERENCE:
                items.append(item)
                continue
            id = item.id or RESPONSE
            content = None if id.startswith(RESPONSE) or size > MOST_BYTES else self.store.get(self.tenant, id)
            found.check(content is not None, f"input[{place}]", f"refers to {quote(id)}, which is not known. {HINT}")
            size += len(content or b"")
            if content is not None:
                items.append(Item.model_validate_json(content))
        found.check(size <= MOST_BYTES, "input", f"refers to items of more than {MOST_BYTES >> 20} MiB")
        found.raise_any()
        return body.model_copy(update={"input": items})

    def response(self, id: str) -> Row:
        """Raises ResponseNotFoundError."""
        found: Row = self._read(id)[0]["response"]
        return found

    def delete(self, id: str) -> None:
        """Raises ResponseNotFoundError."""
        for item in self.response(id)["output"]:
            self.store.delete(self.tenant, item["id"])
        self.store.delete(self.tenant, id)

    def input_items(self, id: str) -> list[Row]:
        """Everything that the response answered, its predecessors included. Raises ResponseNotFoundError and
        InvalidRequestError."""
        kept = self._read(id)[0]
        return [*self._conversation(kept["response"]["previous_response_id"]), *kept["input"]]

    def continued(self, previous: str | None) -> list[Row]:
        """The conversation up to and with a response. Raises InvalidRequestError if it is not known."""
        try:
            return self._conversation(previous)
        except ResponseNotFoundError as error:
            raise InvalidRequestError(FieldViolation("previous_response_id", error.message)) from error

    def _conversation(self, last: str | None) -> list[Row]:
        turns, size = list[list[Row]](), 0
        while last is not None:
            kept, length = self._read(last)
            turns.append([*kept["input"], *kept["response"]["output"]])
            size += length
            if size > MOST_BYTES or sum(map(len, turns)) > MAX_MESSAGES:
                most = f"{MAX_MESSAGES} items and {MOST_BYTES >> 20} MiB"
                raise InvalidRequestError(FieldViolation("previous_response_id", f"has more than {most} before it"))
            last = kept["response"]["previous_response_id"]
        return [item for turn in reversed(turns) for item in turn]

    def _read(self, id: str) -> tuple[Row, int]:
        content = self.store.get(self.tenant, id) if id.startswith(RESPONSE) else None
        if content is None:
            raise _not_found(id)
        return orjson.loads(content), len(content)


def _not_found(id: str) -> ResponseNotFoundError:
    return ResponseNotFoundError(f"there is no response {quote(id)}. {HINT}")


def _input_items(body: ResponsesBody) -> list[Row]:
    """As OpenAI shows them: with ids, and texts as parts."""
    items: Sequence[Item] = [Item(content=body.input)] if isinstance(body.input, str) else body.input
    return [_shown(item) for item in items]


def _shown(item: Item) -> Row:
    kind = item.type or "message"
    found = {**item.model_dump(mode="json", exclude_none=True), "type": kind}
    found.setdefault("id", f"{PREFIXES[kind]}_{secrets.token_hex(12)}")
    if kind == "message":
        found.setdefault("role", "user")
        if isinstance(item.content, str):
            part = "output_text" if item.role == "assistant" else "input_text"
            found["content"] = [{"type": part, "text": item.content}]
    return {**found, "status": found.get("status", "completed")}
