"""Finds the tool calls in an answer while it arrives.

Two forms are supported. Hermes, Qwen and others write {"name": ..., "arguments": {...}} between <tool_call> tags, with
any text around them. Llama 3 and others only answer with such an object, or a list of them, in which "parameters" may
replace "arguments"; a grammar that forces a call makes a model answer like that too.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeAlias

from loraplex_router.text.json_object import ObjectEnd
from loraplex_router.text.tool_prompt import CALL_BEGIN, CALL_END

BETWEEN = " \t\r\n,;[]"  # the characters that may be around the objects of an answer that only consists of calls
# The usual order, in which the arguments can be passed on as they arrive.
CALL_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)"\s*:')
KEYS = ("name", "arguments", "parameters", "type", "id")  # the text that a call may begin with


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call begins. Its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the JSON object that is the last call's arguments, as the model wrote it."""

    text: str


Piece: TypeAlias = str | ToolCall | Arguments


class ToolCallParser:
    """Turns text into content, calls and their arguments, in order. Text that resembles a call but is not a call of a
    tool in `names` becomes content. A call is certain once its arguments begin; whether these are well-formed and
    complete is up to the model. With `calls_alone`, no part of the answer becomes content, whatever its length."""

    def __init__(self, names: Collection[str], calls_alone: bool = False) -> None:
        self._names = names
        self._calls_alone = calls_alone
        self._held = ""  # undecided text
        self._scanned = 0  # how much of it has been searched for the object's end
        self._end = ObjectEnd()
        self._tagged = self._called = False
        self._after_call = False  # followed only by white space so far
        self._state = self._begin

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        found, state = list[Piece](), None
        while state != self._state:
            state = self._state
            found += state()
        return found

    def flush(self) -> list[Piece]:
        """The undecided text at the end of the answer."""
        undecided = self._state in (self._begin, self._read_text, self._seek_object, self._read_object)
        if self._calls_alone or not undecided or (self._called and not self._held.strip(BETWEEN)):
            return []
        return self._content(CALL_BEGIN * self._tagged + self._held)

    # ---- one method per state: it consumes what it can of the held text, and may set the next state -----------

    def _begin(self) -> list[Piece]:
        if start := self._held.lstrip():
            self._state = self._seek_object if start[0] in "{[" else self._read_text
        return []

    def _read_text(self) -> list[Piece]:
        before, tag, self._held = self._cut_at_tag()
        if tag:
            self._tagged, self._state = True, self._seek_object
        return self._content(before)

    def _seek_object(self) -> list[Piece]:
        """A call may begin with the next brace, if only allowed characters are before it."""
        start = self._held.lstrip(None if self._tagged else BETWEEN)
        if start and start[0] != "{":
            return self._refuse()
        if start:
            self._scanned, self._end = len(self._held) - len(start), ObjectEnd()
            self._state = self._read_object
        return []

    def _read_object(self) -> list[Piece]:
        """Waits until it is certain whether this is a call."""
        start = self._held.index("{")
        head, first = CALL_HEAD.match(self._held, start), FIRST_KEY.match(self._held, start)
        if head and head[1] in self._names:
            self._held, self._end = self._held[head.end() :], ObjectEnd()
            self._called, self._state = True, self._read_arguments
            self._after_call = True
            return [ToolCall(head[1])]
        if head or (first and first[1] not in KEYS):
            return self._refuse()
        end = self._end.feed(self._held[self._scanned :])
        if end is None:
            self._scanned = len(self._held)
            return []
        call = self._read_whole(self._held[start : self._scanned + end])
        if call is None:
            return self._refuse()
        self._held = self._held[self._scanned + end :]
        self._finish_call()
        return [*call]

    def _read_arguments(self) -> list[Piece]:
        end = self._end.feed(self._held)
        text, self._held = self._held[:end], "" if end is None else self._held[end:]
        if end is not None:
            self._end, self._state = ObjectEnd(depth=1), self._skip_to_end
        return [Arguments(text)] if text else []

    def _skip_to_end(self) -> list[Piece]:
        """The rest of the call's object after its arguments."""
        end = self._end.feed(self._held)
        self._held = "" if end is None else self._held[end:]
        if end is not None:
            self._finish_call()
        return []

    def _seek_end_tag(self) -> list[Piece]:
        rest = self._held.lstrip()
        if rest.startswith(CALL_END) or not CALL_END.startswith(rest):
            self._held = rest.removeprefix(CALL_END)
            self._tagged, self._state = False, self._read_text
        return []

    # ---- pieces ----------------------------------------------------------------------------------------------

    def _finish_call(self) -> None:
        self._called = self._after_call = True
        self._state = self._seek_end_tag if self._tagged else self._seek_object

    def _refuse(self) -> list[Piece]:
        """The held text is not a call."""
        tag = CALL_BEGIN * self._tagged
        self._tagged, self._state = False, self._read_text
        return self._content(tag)

    def _cut_at_tag(self) -> tuple[str, bool, str]:
        """(text before the tag, whether the tag was found, text after it or a possible beginning of the tag)"""
        before, tag, after = self._held.partition(CALL_BEGIN)
        if tag:
            return before, True, after
        undecided = max(n for n in range(len(CALL_BEGIN)) if before.endswith(CALL_BEGIN[:n]))
        cut = len(before) - undecided
        return before[:cut], False, before[cut:]

    def _content(self, text: str) -> list[Piece]:
        if not text or (self._after_call and text.isspace()):
            return []
        self._after_call = False
        return [text]

    def _read_whole(self, text: str) -> tuple[ToolCall, Arguments] | None:
        """A call with its fields in any order; None if it is not a call."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        name, arguments = found.get("name"), found.get("arguments", found.get("parameters")) or {}
        if not isinstance(name, str) or name not in self._names:
            return None
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return ToolCall(name), Arguments(text)
