"""The rows of tables that Python fills for kernels. Their fields are read from csrc/tables.h, which declares them."""

import re
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from loraplex_shard.kernels.library import SOURCES

_HEADER = re.sub(r"//.*", "", (SOURCES / "tables.h").read_text())
_STRUCTS = dict(re.findall(r"struct (\w+) {(.*?)};", _HEADER, re.DOTALL))
_FIELD = re.compile(r"(?:std::int64_t|const [\w:]+\*) (\w+)|(\w+) (\w+)\[(\d+)\]")


@cache
def widths(struct: str) -> dict[str, int]:
    """The width of each field of a struct, in 64-bit numbers and in order. Only arrays of structs are wider than 1."""
    found = {}
    for declaration in _STRUCTS[struct].split(";")[:-1]:
        field, kind, array, count = _FIELD.fullmatch(declaration.strip()).groups()  # type: ignore[union-attr]
        found[field or array] = int(count) * width(kind) if array else 1
    return found


def width(struct: str) -> int:
    """The number of 64-bit numbers in a struct."""
    return sum(widths(struct).values())


def places(struct: str) -> dict[str, int]:
    """The index of each field's first number."""
    return dict(zip(widths(struct), accumulate(widths(struct).values(), initial=0), strict=False))


def row(struct: str, **values: int | Sequence[int]) -> list[int]:
    """The numbers of a struct with these values of its fields. Arrays of structs are padded with zeros.

    Raises TypeError if a field is missing or unknown.
    """
    if values.keys() != widths(struct).keys():
        raise TypeError(f"{struct} has {tuple(widths(struct))}, not {tuple(values)}")
    numbers: list[int] = []
    for field, length in widths(struct).items():
        value = values[field]
        own = [value] if isinstance(value, int) else value
        numbers += [*own, *[0] * (length - len(own))]
    return numbers
