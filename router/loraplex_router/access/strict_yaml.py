"""Reads YAML and JSON that operators write, and says what is wrong with it."""

from collections import Counter
from collections.abc import Hashable
from typing import Any

import yaml
from pydantic import ValidationError

from loraplex_protos.errors import quote

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C, if PyYAML was built with it: ten times as fast


class DuplicateKeyError(yaml.constructor.ConstructorError):
    """A key is there twice, of which YAML would take the last one."""


class _Loader(_SafeLoader):  # type: ignore[misc]
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.items():
            if count > 1:
                raise DuplicateKeyError(None, None, f"{quote(key)} is there twice", node.start_mark)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def read_yaml(data: bytes) -> Any:
    """Raises yaml.YAMLError or UnicodeDecodeError."""
    return yaml.load(data, _Loader)


def describe(error: ValidationError) -> str:
    """Each fault and where it is, without the value."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    said = ((fault["loc"], fault["msg"].partition(" or instance of ")[0]) for fault in faults)
    return "; ".join(f"{'.'.join(map(str, place)) or 'the file'}: {message}" for place, message in said)
