"""What the command prints and writes."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from bench.gpu.check import Result, Row


def line(result: Result) -> str:
    reason = f"  {' '.join(result.reason.split())[:3000]}" if result.reason else ""
    return f"{result.status}  {result.section}: {result.check}  [{result.seconds:.1f} s]{reason}"


def tables(results: Iterable[Result]) -> str:
    """One table for each section that measured something."""
    sections = groupby(results, key=lambda result: result.section)
    rows = {name: [row for result in of_section for row in result.rows] for name, of_section in sections}
    return "\n".join(f"\n{name}\n{_table(found)}" for name, found in rows.items() if found)


def summary(results: Sequence[Result]) -> str:
    counts = {status: sum(result.status == status for result in results) for status in ("PASS", "FAIL", "LATE")}
    wrong = [f"{result.section}: {result.check}" for result in results if result.status != "PASS"]
    return "\n".join([", ".join(f"{count} {status}" for status, count in counts.items()), *wrong])


def write(path: Path, device: str, seconds: float, results: Iterable[Result]) -> None:
    report = {"device": device, "seconds": round(seconds, 1), "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(report, indent=1) + "\n")


def _table(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(each, widths, strict=True)) for each in cells)


def _cell(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value
