"""Reads values.yaml with its comments: a tree of keys, each with its description, default and JSON schema.

A key's comment is on the lines above it. A comment line that begins with `schema:` is YAML, merged into the schema
implied by the default. A mapping whose keys have no comments is one value, with content defined by Kubernetes.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]

_KEY = re.compile(r"^( *)([A-Za-z0-9-]+):")
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


@dataclass(frozen=True, slots=True)
class Value:
    """One key of values.yaml: a section if it has `children`, otherwise a value."""

    name: str
    text: str
    default: Any
    extra: Schema
    children: "list[Value]" = field(default_factory=list)

    def schema(self) -> Schema:
        """The JSON schema of the key's values."""
        if self.children:
            properties = {child.name: child.schema() for child in self.children}
            return {"type": "object", "additionalProperties": False, "properties": properties}
        return {"type": _TYPES[type(self.default)], **self.extra}


def read_values(path: Path) -> list[Value]:
    """The top level of the tree. Raises ValueError for a key that lacks a comment."""
    text = path.read_text()
    lines = text.splitlines()
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    return [_read(key, node, lines) for key, node in root.value]


def _read(key: yaml.ScalarNode, node: yaml.Node, lines: list[str]) -> Value:
    comment = _comment_above(key.start_mark.line, lines)
    if not comment:
        raise ValueError(f"values.yaml, line {key.start_mark.line + 1}: {key.value} has no comment")
    schemas = [line.removeprefix("schema:") for line in comment if line.startswith("schema:")]
    text = " ".join(line for line in comment if not line.startswith("schema:"))
    extra: Schema = yaml.safe_load(schemas[0]) if schemas else {}
    default = yaml.safe_load(yaml.serialize(node))
    children = [_read(k, n, lines) for k, n in node.value] if _is_section(node, extra, lines) else []
    return Value(key.value, text, default, extra, children)


def _is_section(node: yaml.Node, extra: Schema, lines: list[str]) -> bool:
    if not isinstance(node, yaml.MappingNode) or node.flow_style or extra.keys() & {"settingsOf", "fieldsOf"}:
        return False
    return any(_comment_above(key.start_mark.line, lines) for key, _ in node.value)


def _comment_above(line: int, lines: list[str]) -> list[str]:
    """The comment lines directly above a line, without `#`; none for a key inside a one-line mapping."""
    found = _KEY.match(lines[line])
    mark = f"{found.group(1)}# " if found else "no key here"
    first = line
    while first > 0 and lines[first - 1].startswith(mark):
        first -= 1
    return [comment.removeprefix(mark) for comment in lines[first:line]]
