"""The rule for adapter names, shared by the router, which receives names, and the shards, which look them up.

A name is a folder's name, so it must not lead elsewhere. It appears in comma-separated lists, shell patterns, logs and
tables. Anything that is safe in all of these is allowed.
"""

import re
import unicodedata

MAX_PARTS = 4
MAX_PART_BYTES = 255  # a file system's own limit
MAX_BYTES = 512
MAX_ADDRESS_PARTS = 16
FORBIDDEN = "\\,*?[]"

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]{0,30}:/)?/")

RULE = (
    f"a name has 1 to {MAX_PARTS} parts separated by /, and at most {MAX_BYTES} bytes; a part has printable characters"
    f" other than {' '.join(FORBIDDEN)} and does not begin with a dot, or begin or end with a space"
)


def normal(name: str) -> str:
    """The name in Unicode's NFC form, in which names are compared: umlauts may be encoded as one character or two."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def is_name(name: str) -> bool:
    """Whether this is a valid adapter name, by RULE."""
    parts = name.split("/")
    return len(parts) <= MAX_PARTS and _size(name) <= MAX_BYTES and all(map(is_part, parts))


def why_not(name: str) -> str:
    """What is wrong with a name that is not valid, and the rule."""
    parts, size = name.split("/"), _size(name)
    if size > MAX_BYTES:  # before each character is looked at
        return f"it has {size} bytes: {RULE}"
    character = next((c for c in name if c in FORBIDDEN or not c.isprintable()), None)
    if character is not None:
        wrong = f"it has {character!r}" if character.isprintable() else f"it has the character U+{ord(character):04X}"
    elif not all(parts):
        wrong = "a part is empty"
    elif any(part.startswith(".") for part in parts):
        wrong = "a part begins with a dot"
    elif any(part != part.strip(" ") for part in parts):
        wrong = "a part begins or ends with a space"
    elif len(parts) > MAX_PARTS:
        wrong = f"it has {len(parts)} parts"
    else:
        wrong = f"a part has more than {MAX_PART_BYTES} bytes"
    return f"{wrong}: {RULE}"


def is_id(id: str) -> bool:
    """Whether a request may use this id: a name, or an address such as s3://bucket/folder or /srv/adapters/name. Each
    source interprets its own addresses."""
    address = _ADDRESS.match(id)
    parts = id[address.end() :].removesuffix("/").split("/") if address else []
    return is_name(id) or (0 < len(parts) <= MAX_ADDRESS_PARTS and _size(id) <= MAX_BYTES and all(map(is_part, parts)))


def is_part(part: str) -> bool:
    """Whether this is a valid part of a name."""
    return (
        0 < _size(part) <= MAX_PART_BYTES
        and part.isprintable()
        and not part.startswith((".", " "))
        and not part.endswith(" ")
        and not any(character in FORBIDDEN for character in part)
    )


def _size(text: str) -> int:
    return len(text.encode(errors="replace"))
