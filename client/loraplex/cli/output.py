"""How commands print results: names are never cut, a pipe gets one line per row, and programs get JSON."""

import io
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import typer
from rich.cells import cell_len

from loraplex import LoraplexError, StreamPiece

PIPE = 10_000  # columns: output to a pipe is not wrapped, unless COLUMNS is set
GAP = "  "
KEPT = "\0"  # a blank at which no line is broken


def width() -> int:
    """The terminal's columns, or COLUMNS if it is set."""
    return shutil.get_terminal_size(fallback=(PIPE, 24)).columns


def print_whatever_the_encoding() -> None:
    """Lets the process print any text: characters that the terminal's encoding lacks become escapes instead of
    errors."""
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Answer:
    """Shows a stream as it arrives, and ends with a newline. `text` is what has been shown so far."""

    def __init__(self) -> None:
        self.text = ""

    def show(self, stream: Iterable[StreamPiece]) -> None:
        try:
            for piece in stream:
                for warning in piece.warnings:
                    typer.echo(f"Warning: {warning}", err=True)
                typer.echo(piece.text, nl=False)
                self.text += piece.text
        except LoraplexError:
            if self.text:
                typer.echo()
            raise
        except KeyboardInterrupt:
            typer.echo()
            raise
        typer.echo()


def as_json(value: object) -> str:
    """`value` consists of plain data and string enumerations."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def listing(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    columns: int,
    right: frozenset[str] = frozenset(),
    remarks: Sequence[str] = (),
) -> list[str]:
    """The rows as lines of text, at most `columns` wide. If they fit, they are a table, from which empty columns are
    dropped first. Otherwise each row is its first cell, with the other cells below it. `right` has the headings of the
    columns that are aligned to the right. `remarks` has one text per row, which goes to the end of the row's line or,
    if it does not fit, below it."""
    cells = [tuple(headings), *map(tuple, rows)]
    filled = [index for index in range(len(headings)) if any(row[index] for row in rows)]
    for table in cells, [tuple(row[index] for index in filled) for row in cells]:
        widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]
        if sum(widths) + len(GAP) * (len(widths) - 1) <= columns:
            sides = [name in right for name in table[0]]
            first, *lines = (GAP.join(map(_justify, row, widths, sides)).rstrip() for row in table)
            items = [[line] for line in lines]
            break
    else:
        first, items = "", [_item(headings, row, columns) for row in rows]
    shown = [first] if first else []
    for item, remark in zip_longest(items, remarks, fillvalue=""):
        shown += _with_remark(list(item), remark, columns)
    return shown


def _justify(text: str, columns: int, right: bool) -> str:
    blank = " " * (columns - cell_len(text))
    return blank + text if right else text + blank


def _item(headings: Sequence[str], row: Sequence[str], columns: int) -> list[str]:
    pairs = (f"{heading} {text}" for heading, text in zip(headings[1:], row[1:], strict=True) if text)
    return [row[0], *pairs_in_lines(pairs, columns, indent=GAP)]


def _with_remark(lines: list[str], remark: str, columns: int) -> list[str]:
    if remark and cell_len(lines[-1] + GAP + remark) <= columns:
        return [*lines[:-1], lines[-1] + GAP + remark]
    return [*lines, *_wrapped(remark, columns, GAP)]


def pairs_in_lines(pairs: Iterable[str], columns: int, indent: str = "") -> list[str]:
    """Puts as many pairs into each line as fit into `columns`; a pair is never divided."""
    kept = (GAP + " ").join(pair.replace(" ", KEPT) for pair in pairs)
    return [line.replace(KEPT, " ") for line in _wrapped(kept, columns, indent)]


def _wrapped(text: str, columns: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text, columns, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
