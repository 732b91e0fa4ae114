"""How commands show what they know: names whole at any width, one line per row through a pipe, JSON for programs."""

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

PIPE = 10_000  # columns: through a pipe nothing is wrapped, unless COLUMNS says so
GAP = "  "
KEPT = "\0"  # a blank where no line ends


def width() -> int:
    """Columns of the terminal, or what COLUMNS says."""
    return shutil.get_terminal_size(fallback=(PIPE, 24)).columns


def print_whatever_the_encoding() -> None:
    """Lets the process print any text: what the terminal's encoding lacks is shown as an escape, not an error."""
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Answer:
    """A stream, shown as it comes; what follows it begins a line of its own. `text` is what was shown so far."""

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
    """`value` of plain data and enumerations of strings."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def listing(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    columns: int,
    right: frozenset[str] = frozenset(),
    remarks: Sequence[str] = (),
) -> list[str]:
    """Lines with the rows as a table if `columns` have room for it, at first without the columns that are empty, else
    each row as its first cell and, below it, what else is known of it. `right` are the headings of columns of numbers;
    `remarks`, one for each row, follow it, on lines of their own where they need them."""
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
    """As many of them in a line as `columns` have room for; none is divided."""
    kept = (GAP + " ").join(pair.replace(" ", KEPT) for pair in pairs)
    return [line.replace(KEPT, " ") for line in _wrapped(kept, columns, indent)]


def _wrapped(text: str, columns: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text, columns, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
