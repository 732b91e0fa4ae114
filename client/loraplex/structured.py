"""Answers that are values of a Python type."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from loraplex.grammars import JsonSchema
from loraplex.schemas import explain, schema_of, validator_of
from loraplex.types import FinishReason, Generation, StreamPiece
from loraplex_protos.errors import LoraplexError

T = TypeVar("T")


class AnswerError(LoraplexError):
    """An answer is not what was asked for: it was cut off, or it does not fit the type."""

    error_type = "answer"

    def __init__(self, message: str, text: str, finish_reason: FinishReason) -> None:
        super().__init__(message)
        self.text = text
        self.finish_reason = finish_reason


@dataclass(frozen=True, slots=True)
class ParsedGeneration(Generation, Generic[T]):
    """The answer to `parse`."""

    values: tuple[T, ...] = ()
    """One per sequence."""

    @property
    def parsed(self) -> T:
        """The value of the first sequence."""
        return self.values[0]


@dataclass(frozen=True, slots=True)
class ParsedPiece(StreamPiece, Generic[T]):
    """What `stream_parsed` yields: the next piece of one sequence."""

    parsed: T | None = None
    """On the last piece of a sequence: its value."""


def grammar_of(kind: Any) -> JsonSchema:
    """The grammar of a type's values, as JSON."""
    return JsonSchema(schema_of(kind))


def parsed_generation(kind: type[T], generation: Generation) -> ParsedGeneration[T]:
    """Raises AnswerError if one of the sequences is not a value of this type."""
    warnings = generation.warnings
    values = tuple(_parsed(kind, each.text, each.finish_reason, warnings) for each in generation.sequences)
    return ParsedGeneration(**_fields(generation), values=values)


class PieceParser(Generic[T]):
    """Adds to each sequence's last piece what its text is."""

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        self._texts = dict[int, str]()
        self._warnings = dict[int, tuple[str, ...]]()

    def read(self, piece: StreamPiece) -> ParsedPiece[T]:
        """Raises AnswerError if this piece ends a sequence that is not a value of the type."""
        text = self._texts[piece.index] = self._texts.get(piece.index, "") + piece.text
        warnings = self._warnings.setdefault(piece.index, piece.warnings)
        value = None if piece.finish_reason is None else _parsed(self._kind, text, piece.finish_reason, warnings)
        return ParsedPiece(**_fields(piece), parsed=value)


def _parsed(kind: Any, text: str, finish_reason: FinishReason, warnings: Sequence[str]) -> Any:
    if finish_reason is not FinishReason.END_TOKEN:
        raise AnswerError(f"the answer was cut off (finish reason {finish_reason.value})", text, finish_reason)
    try:
        return validator_of(kind).validate_json(text)
    except ValueError as error:
        reason = "; ".join([f"the answer is not a {kind.__name__}: {explain(error)}", *warnings])
        raise AnswerError(reason, text, finish_reason) from error


def _fields(data: Generation | StreamPiece) -> dict[str, Any]:
    return {each.name: getattr(data, each.name) for each in fields(data)}
