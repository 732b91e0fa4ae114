"""Finds the tool calls in an answer while it arrives.

Two forms are known. Hermes, Qwen and others write {"name": ..., "arguments": {...}} between <tool_call> tags, with any
text around. Llama 3 and others answer with nothing but such an object, or a list of them, where "parameters" may stand
for "arguments"; a grammar that forces a call makes a model answer like that, too.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from loraplex_router.text.tool_prompt import CALL_BEGIN, CALL_END

BETWEEN = " \t\r\n,;[]"  # what may stand around and between the objects of an answer that is calls alone


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str  # a JSON object


class ToolCallParser:
    """Text in; content and calls out, in order. What looks like a call but is none, or of no tool in `names`, comes out
    as content."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""  # not decided yet
        self._advance = self._begin
        self._called = False

    def feed(self, text: str) -> Iterator[str | ToolCall]:
        self._held += text
        return self._advance()

    def flush(self) -> Iterator[str | ToolCall]:
        """What is left at the end."""
        if self._advance == self._read_tagged:
            yield self._read(self._held) or CALL_BEGIN + self._held
        elif self._advance == self._read_bare:
            yield from self._content(self._held if self._held.strip(BETWEEN) else "")
        else:
            yield from self._content(self._held)

    # ---- one method for each state ---------------------------------------------------------------------------

    def _begin(self) -> Iterator[str | ToolCall]:
        if start := self._held.lstrip():
            self._advance = self._read_bare if start[0] in "{[" else self._read_text
            yield from self._advance()

    def _read_text(self) -> Iterator[str | ToolCall]:
        before, tag, after = self._held.partition(CALL_BEGIN)
        if tag:
            self._held, self._advance = after, self._read_tagged
        else:
            undecided = max(n for n in range(len(CALL_BEGIN)) if before.endswith(CALL_BEGIN[:n]))
            cut = len(before) - undecided
            before, self._held = before[:cut], before[cut:]
        yield from self._content(before)
        if tag:
            yield from self._read_tagged()

    def _read_tagged(self) -> Iterator[str | ToolCall]:
        body, tag, after = self._held.partition(CALL_END)
        if tag:
            self._held, self._advance = after, self._read_text
            yield self._read(body) or CALL_BEGIN + body + CALL_END
            yield from self._read_text()

    def _read_bare(self) -> Iterator[str | ToolCall]:
        while (start := self._held.find("{")) >= 0 and "}" in self._held:
            try:
                found, end = json.JSONDecoder().raw_decode(self._held, start)
            except ValueError:
                return  # not whole yet
            call = self._as_call(found)
            if call is None:
                self._advance = self._read_text
                yield from self._read_text()
                return
            self._held = self._held[end:]
            yield call

    # ---- pieces ----------------------------------------------------------------------------------------------

    def _content(self, text: str) -> Iterator[str]:
        if text and not (self._called and text.isspace()):
            yield text

    def _read(self, text: str) -> ToolCall | None:
        try:
            return self._as_call(json.loads(text))
        except ValueError:
            return None

    def _as_call(self, found: Any) -> ToolCall | None:
        if not isinstance(found, dict) or found.get("name") not in self._names:
            return None
        self._called = True
        arguments = found.get("arguments", found.get("parameters", {}))
        return ToolCall(found["name"], arguments if isinstance(arguments, str) else json.dumps(arguments))
