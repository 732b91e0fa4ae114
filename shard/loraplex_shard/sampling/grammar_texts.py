"""Grammars as clients write them, in the Lark that llguidance reads."""

import re

from llguidance.gbnf_to_lark import any_to_lark, is_lark_syntax

# ?rule and !rule shape the tree that a parser makes: here nothing is parsed.
TREE_MARK = re.compile(r"(?m)^(\s*)[?!](?=\w+\s*:)")
ESCAPED = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)")


def to_lark(text: str) -> str:
    """From GBNF, or from Lark. Raises an exception of no class in particular if it is neither."""
    unmarked = TREE_MARK.sub(r"\1", text)
    return unmarked if is_lark_syntax(unmarked) else any_to_lark(ESCAPED.sub(_character, text))


def _character(escaped: re.Match[str]) -> str:
    """The converter from GBNF writes escapes that llguidance cannot read."""
    code = int(escaped[1] or escaped[2] or "0", 16)
    plain = 0x80 <= code < 0xD800 or 0xE000 <= code <= 0x10FFFF or (code < 0x80 and chr(code).isalnum())
    return chr(code) if plain else escaped[0]
