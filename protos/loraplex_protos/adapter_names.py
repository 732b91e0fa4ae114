"""What an adapter may be called: one rule for the router, which is asked for names, and the shards, which look there.

A name is that of a folder, so it must not lead anywhere else; it is part of lists divided by commas, and of patterns as
a shell knows them; it is shown in logs and tables. Whatever harms none of these is allowed.
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
    f"a name has 1 to {MAX_PARTS} parts divided by /, and {MAX_BYTES} bytes at most; a part has printable characters"
    f" other than {' '.join(FORBIDDEN)} and does not begin with a dot, nor begin or end with a blank"
)


def normal(name: str) -> str:
    """The name in the one form in which it is compared: umlauts may be written as one character or as two."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def is_name(name: str) -> bool:
    """Whether an adapter may be called so. RULE says why not."""
    parts = name.split("/")
    return len(parts) <= MAX_PARTS and _size(name) <= MAX_BYTES and all(map(is_part, parts))


def is_id(id: str) -> bool:
    """Whether a request may name an adapter so: by its name, or by its address as people write it elsewhere, such as
    s3://bucket/folder or /srv/adapters/name. What an address means is for the source that knows it."""
    address = _ADDRESS.match(id)
    parts = id[address.end() :].removesuffix("/").split("/") if address else []
    return is_name(id) or (0 < len(parts) <= MAX_ADDRESS_PARTS and _size(id) <= MAX_BYTES and all(map(is_part, parts)))


def is_part(part: str) -> bool:
    """Whether it may stand between two slashes of a name."""
    return (
        0 < _size(part) <= MAX_PART_BYTES
        and part.isprintable()
        and not part.startswith((".", " "))
        and not part.endswith(" ")
        and not any(character in FORBIDDEN for character in part)
    )


def _size(text: str) -> int:
    return len(text.encode(errors="replace"))
