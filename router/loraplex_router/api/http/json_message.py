"""Messages of generation.proto as JSON: fields by name, null for absent ones, and enum values in lower case without the
enum's name."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor
from google.protobuf.message import Message

Write = Callable[[Any], Any]


def write_message(message: Message) -> dict[str, Any]:
    return {
        name: None if optional and not message.HasField(name) else write(getattr(message, name))
        for name, optional, write in _fields(message.DESCRIPTOR)
    }


@cache
def enum_names(enum: EnumDescriptor) -> dict[int, str]:
    """ADAPTER_TIER_DISK of AdapterTier is disk."""
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.name) + "_"
    return {value.number: value.name[len(prefix) :].lower() for value in enum.values}


@cache
def _fields(kind: Descriptor) -> list[tuple[str, bool, Write]]:
    """The fields' names, whether they can be absent, and the functions that write them."""
    return [(field.name, field.has_presence, _writer(field)) for field in kind.fields]


def _writer(field: Any) -> Write:
    write: Write = write_message if field.message_type else lambda value: value
    if field.enum_type:
        write = enum_names(field.enum_type).__getitem__
    return (lambda values: [write(value) for value in values]) if field.is_repeated else write
