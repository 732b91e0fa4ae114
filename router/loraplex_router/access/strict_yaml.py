"""Reads YAML and JSON that operators write, and says what is wrong with it."""

from collections import Counter
from collections.abc import Hashable
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from loraplex_protos.errors import quote

_SafeLoader: Any = yaml.SafeLoader
if yaml.__with_libyaml__:
    from yaml.cyaml import CParser  # type: ignore[attr-defined]

    class _CSafeLoader(Composer, CParser, SafeConstructor, Resolver):
        """Parses in C. yaml.CSafeLoader composes in C as well, which ends the process if nesting is deep."""

        def __init__(self, stream: bytes) -> None:
            CParser.__init__(self, stream)
            Composer.__init__(self)
            SafeConstructor.__init__(self)
            Resolver.__init__(self)

    _SafeLoader = _CSafeLoader


class DuplicateKeyError(yaml.constructor.ConstructorError):
    """A key is there twice, of which YAML would take the last one."""


class BadValueError(yaml.constructor.ConstructorError):
    """A value is not what its tag or its form says, such as a date that does not exist."""


class _Loader(_SafeLoader):  # type: ignore[misc]
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # of any kind: the library lets through what int, datetime and others raise
            kind = node.tag.rpartition(":")[2]
            problem = f"a value is read as !!{kind}, which it is not: put a text in quotes"
            raise BadValueError(None, None, problem, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()  # what is tagged as one may be a text
        keys = Counter(key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode))
        for key, count in keys.items():
            if count > 1:
                raise DuplicateKeyError(None, None, f"{quote(key)} is there twice", node.start_mark)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def read_yaml(data: bytes) -> Any:
    """Raises yaml.YAMLError or UnicodeDecodeError."""
    try:
        return yaml.load(data, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def key_lines(data: bytes) -> dict[tuple[str, ...], int]:
    """The line of each key in what read_yaml reads, by the keys above it and the key."""
    found: dict[tuple[str, ...], int] = {}
    left: list[tuple[tuple[str, ...], Any]] = [((), yaml.compose(data, _Loader))]
    while left:
        above, node = left.pop()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                found[*above, key.value] = key.start_mark.line + 1
                left.append(((*above, key.value), value))
    return found


def describe(error: ValidationError) -> str:
    """Each fault and where it is, without the value."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    said = ((fault["loc"], fault["msg"].partition(" or instance of ")[0]) for fault in faults)
    return "; ".join(f"{'.'.join(map(str, place)) or 'the file'}: {message}" for place, message in said)
