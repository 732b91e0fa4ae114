"""What a chat template does with messages, found out by rendering small conversations with it.

Clients write messages in OpenAI's form, but templates read several forms, and transformers leaves the choice to its
caller. A form is right if the prompt lacks none of the content, and contains nothing in the notation of Python or JSON.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import Any

Row = dict[str, Any]  # a message as a template reads it
Render = Callable[[list[Row], list[Row] | None], str]  # messages and tools -> prompt

ROLES = "system", "user", "assistant", "tool"
TEXT = "firstpart secondpart"
PARTS = [{"type": "text", "text": text} for text in TEXT.split()]
ARGUMENTS = {"probekey": "probevalue"}
WRITTEN_ARGUMENTS = json.dumps(ARGUMENTS)
PARAMETERS = {"type": "object", "properties": {"probekey": {"type": "string"}}, "required": []}
FUNCTION = {"name": "probetool", "description": "Probes.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
# Signs that a dict, a list of parts, or a JSON text within a JSON text was printed.
DATA = "'probekey'", '\\"probekey', "'type': 'text'", '"type": "text"', '"type":"text"'


class CallIds(Enum):
    """The form of calls' ids, by an example. There is one call, of `probecall`."""

    ANY = "call_0123456789abcdef"
    SHORT = "probe1234"  # nine letters and digits, which Mistral's templates require
    NUMBERED = "functions.probecall:0"  # for some of Kimi's templates


class Blank(Enum):
    """How a message without content is written."""

    ABSENT = "absent"  # transformers' form
    NULL = "null"
    EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class Traits:
    reads_tools: bool  # it shows the available tools
    tool_needs: frozenset[str]  # fields of functions and of their parameters' properties that it needs
    hides_calls: bool  # an assistant's text is shown, but not its calls
    hides_results: bool  # a user's text is shown, but not a call's result
    takes_system: bool  # a system message is shown
    call_ids: CallIds
    knows_developer: bool  # OpenAI's newer name for the role "system"
    arguments_as_text: bool  # calls' arguments are the client's text; otherwise the parsed object
    blank: Blank  # a message without content
    blank_call: Blank  # a message that has calls instead
    empty_hides_calls: bool  # calls beside an empty text are not shown
    takes_parts: frozenset[str]  # roles whose content may be a list of parts
    needs_parts: frozenset[str]  # roles whose content must be one
    turn_end: str  # the text after an answer


def find_traits(source: str, variables: Collection[str], render: Render) -> Traits:
    """`variables` are the ones that the template reads. If `render` raises, the template refuses the conversation."""

    def attempt(rows: list[Row], tools: list[Row] | None = None) -> str | None:
        try:
            return render(rows, tools)
        except Exception:  # it is a program
            return None if tools else attempt(rows, [TOOL])  # a template that needs tools

    def called(arguments: Any, blank: Blank, ids: CallIds) -> str | None:
        """Renders messages with calls; some templates only write calls if there are tools."""
        rows = _called(arguments, blank, ids)
        without = attempt(rows)
        return without if without is not None and _names_call(without) else attempt(rows, [TOOL])

    def rank(ids: CallIds, blank: Blank) -> int:
        """How well this form suits a message with calls."""
        texts = called(ARGUMENTS, blank, ids), called(WRITTEN_ARGUMENTS, blank, ids)
        shown = [text for text in texts if text is not None]
        return max((1 + (_names_call(text) and "None" not in text) for text in shown), default=0)

    ids, blank_call = max(product(CallIds, Blank), key=lambda forms: rank(*forms))  # the first of the best
    as_object, as_text = called(ARGUMENTS, blank_call, ids), called(WRITTEN_ARGUMENTS, blank_call, ids)
    text_is_right = _shows(as_text, *ARGUMENTS, *ARGUMENTS.values())
    object_is_right = _shows(as_object, *ARGUMENTS, *ARGUMENTS.values())
    arguments_as_text = text_is_right and (as_text == as_object or not object_is_right)
    arguments, shown = (WRITTEN_ARGUMENTS, as_text) if arguments_as_text else (ARGUMENTS, as_object)

    def said(role: str, content: Any) -> str | None:
        return attempt(_said(role, content, _called(arguments, blank_call, ids)))

    knows_calls = "tool_calls" in source  # if it still refuses some, it has its reasons
    takes_parts = frozenset(role for role in ROLES if _shows(said(role, PARTS), *TEXT.split()))
    takes_text = frozenset(role for role in ROLES if _shows(said(role, TEXT), TEXT))
    _, answered, behind = (attempt(_said("assistant", TEXT, [])[:2]) or "").rpartition(TEXT)
    return Traits(
        reads_tools="tools" in variables,
        tool_needs=_tool_needs(attempt),
        hides_calls=not (knows_calls or (shown is not None and _names_call(shown))) and "assistant" in takes_text,
        hides_results=not (knows_calls or _shows(shown, "proberesult")) and "user" in takes_text,
        takes_system="system" in takes_text,
        call_ids=ids,
        knows_developer="developer" in source,
        arguments_as_text=arguments_as_text,
        blank=Blank.EMPTY if said("assistant", None) is None else Blank.ABSENT,
        blank_call=blank_call,
        empty_hides_calls=rank(ids, Blank.EMPTY) < rank(ids, blank_call),
        takes_parts=takes_parts,
        needs_parts=takes_parts - takes_text,
        turn_end=behind if answered else "",
    )


def _tool_needs(attempt: Callable[[list[Row], list[Row] | None], str | None]) -> frozenset[str]:
    def takes(function: Row) -> bool:
        return attempt(_said("user", TEXT, []), [{**TOOL, "function": function}]) is not None

    if not takes(FUNCTION):
        return frozenset()
    lacking = {left_out: {name: value for name, value in FUNCTION.items() if name != left_out} for left_out in FUNCTION}
    lacking["properties"] = {**FUNCTION, "parameters": {"type": "object"}}
    return frozenset(name for name, function in lacking.items() if not takes(function))


def _names_call(text: str) -> bool:
    """Some templates write a call's name, others its id."""
    return any(piece in text for piece in ("probecall", *(ids.value for ids in CallIds), *ARGUMENTS.values()))


def _shows(text: str | None, *pieces: str) -> bool:
    """Whether the prompt contains all of this, and in the right form."""
    return text is not None and all(piece in text for piece in pieces) and not any(data in text for data in DATA)


def _called(arguments: Any, blank: Blank, ids: CallIds) -> list[Row]:
    function = {"name": "probecall", "arguments": arguments}
    call = {"role": "assistant", "tool_calls": [{"id": ids.value, "type": "function", "function": function}]}
    return [
        {"role": "user", "content": "Hi"},
        write_blank(call, blank),
        {"role": "tool", "tool_call_id": ids.value, "content": "proberesult"},
    ]


def _said(role: str, content: Any, called: list[Row]) -> list[Row]:
    """A conversation in which this role has this content."""
    said = {"role": role} if content is None else {"role": role, "content": content}
    asked = {"role": "user", "content": "Hi"}
    match role:
        case "system":
            return [said, asked]
        case "assistant":
            return [asked, said, asked]
        case "tool":
            return [*called[:2], {**called[2], **said}]
        case _:
            return [said]


def write_blank(row: Row, blank: Blank) -> Row:
    """The message without content, in this form."""
    match blank:
        case Blank.ABSENT:
            return {name: value for name, value in row.items() if name != "content"}
        case Blank.NULL:
            return {**row, "content": None}
        case Blank.EMPTY:
            return {**row, "content": ""}
