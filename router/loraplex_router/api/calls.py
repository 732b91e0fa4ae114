"""Calls of tools: the grammar of an answer that must have some, and those that are found in an answer."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from loraplex_router.engine.delta import Delta
from loraplex_router.text.harmony import HarmonyParser
from loraplex_router.text.reasoning import HARMONY, Reasoning, ReasoningParser
from loraplex_router.text.tool_calls import Arguments, Piece, ToolCall, ToolCallParser
from loraplex_router.text.tool_grammar import list_of_calls, one_call, read_parameters
from loraplex_router.vocabulary.grammar import EmbeddedSchema, Grammar
from loraplex_router.vocabulary.thoughts import Thoughts

MAX_TOOLS = 1024  # OpenAI accepts 128
TOOL_NAME = r"[A-Za-z0-9_.-]{1,128}"


@dataclass(frozen=True, slots=True)
class DeclaredTool:
    """A tool that the answer may call."""

    name: str
    parameters: Mapping[str, Any] | None  # the schema of its arguments
    field: str  # of the request that the schema is from
    strict: bool = False  # refused if a keyword of the schema cannot be enforced


def forced_calls(tools: Sequence[DeclaredTool], chosen: str | None, several: bool) -> Grammar:
    """A call of the tool `chosen`; without it, a list of calls of any tools. text/tool_calls.py parses them."""
    wanted = list[tuple[str, EmbeddedSchema]]()
    for tool in tools:
        if chosen in (None, tool.name):
            wanted.append((tool.name, read_parameters(tool.parameters, tool.name, tool.field, tool.strict)))
    if chosen is not None:
        return one_call(*wanted[0], "tool_choice")
    return list_of_calls(wanted, several, "tool_choice")


class AnswerReader:
    """Finds the calls in one answer while it arrives, and the thoughts that it may begin with. `names`: the tools that
    it may call. `calls_alone`: the grammar forces it to call. Without `several`, calls after the first are left
    out."""

    def __init__(
        self,
        names: Collection[str],
        calls_alone: bool = False,
        several: bool = True,
        thoughts: Thoughts | None = None,
    ) -> None:
        self._separator = _separator(thoughts, names)
        self._parser = ToolCallParser(names, calls_alone) if names else None
        self._most_calls = inf if several else 1
        self._found = 0  # number of calls, including those beyond the limit

    @property
    def calls(self) -> int:
        """The number of calls shown."""
        return int(min(self._found, self._most_calls))

    def pieces(self, delta: Delta) -> Iterator[Piece | Reasoning]:
        for piece in self._separate(delta):
            if isinstance(piece, Reasoning):
                yield piece
            elif isinstance(piece, str) and self._parser is not None:
                yield from self._count(self._parser.feed(piece))
            else:
                yield from self._count([piece])
        if delta.finish_reason and self._parser is not None:
            yield from self._count(self._parser.flush())

    def _separate(self, delta: Delta) -> Sequence[Reasoning | Piece]:
        if self._separator is None:
            return [delta.text] if delta.text else []
        return [*self._separator.feed(delta.text), *(self._separator.flush() if delta.finish_reason else ())]

    def _count(self, pieces: list[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            self._found += isinstance(piece, ToolCall)
            if not isinstance(piece, ToolCall | Arguments) or self._found <= self._most_calls:
                yield piece


def _separator(thoughts: Thoughts | None, names: Collection[str]) -> ReasoningParser | HarmonyParser | None:
    if thoughts and thoughts.before_answer == HARMONY.before_answer:
        return HarmonyParser(names, thoughts.begun)
    return ReasoningParser(thoughts) if thoughts else None
