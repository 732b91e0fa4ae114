"""GPT-OSS's answers while they arrive: messages on channels, which is OpenAI's harmony format.

Thoughts are on the channel `analysis`, the answer on `final`, what is said before a call on `commentary`. A message to
a function is a call of it: <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}.
The prompt ends with the first message's <|start|>assistant.
"""

import re
from collections.abc import Callable, Collection

from loraplex_router.text.reasoning import Reasoning, undecided
from loraplex_router.text.tool_calls import Arguments, Piece, ToolCall

BEGINNINGS = ("<|start|>", "<|channel|>")
MESSAGE = "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
THOUGHTS = re.compile(r"<\|channel\|>\s*analysis")
CALL = re.compile(r"\bto=functions\.([^\s<]+)")


class HarmonyParser:
    """Turns text, with its special tokens, into thoughts, calls of the tools in `names`, and content. `begun`: the
    prompt ends within thoughts. An answer without any header is content."""

    def __init__(self, names: Collection[str], begun: bool) -> None:
        self._names = names
        self._held = ""  # undecided text
        self._write: Callable[[str], Reasoning | Piece] = Reasoning  # what a message's text is
        self._state = self._read_message if begun else self._read_header

    def feed(self, text: str) -> list[Reasoning | Piece]:
        self._held += text
        found, state = list[Reasoning | Piece](), None
        while state != self._state:
            state = self._state
            found += state()
        return found

    def flush(self) -> list[Reasoning | Piece]:
        """The undecided text at the end of the answer. A header that was cut off is nothing."""
        held, self._held = self._held, ""
        return [self._write(held)] if held and self._state == self._read_message else []

    # ---- one method per state: it consumes what it can of the held text, and may set the next state -----------

    def _read_header(self) -> list[Reasoning | Piece]:
        start = self._held.lstrip()
        if not any(start.startswith(tag) or tag.startswith(start) for tag in BEGINNINGS):
            self._write, self._state = str, self._read_message
            return []
        header, tag, after = self._held.partition(MESSAGE)
        if not tag:
            return []
        self._held, self._state = after, self._read_message
        call = CALL.search(header)
        if call and call[1] in self._names:
            self._write = Arguments
            return [ToolCall(call[1])]
        self._write = Reasoning if THOUGHTS.search(header) else str
        return []

    def _read_message(self) -> list[Reasoning | Piece]:
        found = [(self._held.index(tag), tag) for tag in ENDS if tag in self._held]
        if found:
            end, tag = min(found)
            text, self._held = self._held[:end], self._held[end:]
            self._held = self._held if tag in BEGINNINGS else self._held.removeprefix(tag)
            self._state = self._read_header
        else:
            end = len(self._held) - max(undecided(self._held, tag) for tag in ENDS)
            text, self._held = self._held[:end], self._held[end:]
        return [self._write(text)] if text else []
