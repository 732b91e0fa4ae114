"""Python and C++ have the same tables: what Python reads from tables.h is what the compiler makes of it."""

import subprocess

import pytest

from loraplex_shard.kernels.library import SOURCES, _compiler
from loraplex_shard.kernels.tables import _STRUCTS, places, row, width


@pytest.mark.parametrize("struct", _STRUCTS)
def test_the_compiler_puts_each_field_where_python_does(struct: str) -> None:
    claims = [f"sizeof({struct}) == {8 * width(struct)}"]
    claims += [f"offsetof({struct}, {field}) == {8 * place}" for field, place in places(struct).items()]
    program = '#include <cstddef>\n#include "tables.h"\nusing namespace loraplex;\n'
    program += "".join(f"static_assert({claim});\n" for claim in claims)
    command = [_compiler(), "-std=c++20", "-fsyntax-only", "-x", "c++", f"-I{SOURCES}", "-"]
    compiled = subprocess.run(command, input=program, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr


def test_a_row_has_each_value_in_its_place_and_zeros_for_absent_parts() -> None:
    values = {field: 10 + number for number, field in enumerate(places("LoraPart"))}
    part = row("LoraPart", **values)
    assert {field: part[place] for field, place in places("LoraPart").items()} == values
    layer = row("LoraLayer", lora_rank=7, parts=1, shrink=8, scales=9, part=part)
    first = places("LoraLayer")["part"]
    assert len(layer) == width("LoraLayer")
    assert layer[first : first + len(part)] == part
    assert not any(layer[first + len(part) :])
    assert layer[places("LoraLayer")["shrink"]] == 8


def test_a_row_without_a_field_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"Expert has .*'group'"):
        row("Expert", weight=1, bias=2, bits=4)


def test_a_row_with_an_unknown_field_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="'zeros'"):
        row("Expert", weight=1, bias=2, bits=4, group=32, zeros=3)
