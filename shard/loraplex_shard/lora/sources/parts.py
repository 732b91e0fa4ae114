"""The ETag of an object that was uploaded to S3 in parts: the MD5 of their MD5s, and the number of parts. Nobody says
how large they were, so the sizes that programs use are tried."""

import hashlib
import re
from collections.abc import Iterator
from typing import IO

_MIB = 2**20
# Of AWS's tools and consoles, MinIO's, rclone, s5cmd and others. Larger objects have the next sizes that are enough.
_USUAL = (*(size * _MIB for size in (5, 6, 8, 10, 12, 15, 16, 20, 25, 32, 50, 64, 100, 128, 256, 512)), 17_179_870)
_TAG = re.compile(r'"?([0-9a-f]{32})-(\d{1,5})"?')


def is_of_parts(tag: str) -> bool:
    return _TAG.fullmatch(tag.lower()) is not None


def has_tag(content: IO[bytes], size: int, tag: str) -> bool:
    """Whether an object with this content, which has `size` bytes, has this ETag of parts. If not, its parts may also
    have an unusual size, or its store makes such ETags of something else."""
    match = _TAG.fullmatch(tag.lower())
    return match is not None and any(_combined(content, part) == match[1] for part in _sizes(size, int(match[2])))


def _sizes(size: int, count: int) -> Iterator[int]:
    """Sizes of parts of which `count` make up the size."""
    least = -(-size // count) if count else 0
    whole = -(-least // _MIB) * _MIB
    return (part for part in sorted({whole, *_USUAL}) if part and max(1, -(-size // part)) == count)


def _combined(content: IO[bytes], part: int) -> str:
    content.seek(0)
    parts = hashlib.md5()
    while (own := _md5(content, part)) is not None:
        parts.update(own)
    return parts.hexdigest()


def _md5(content: IO[bytes], size: int) -> bytes | None:
    """Of the next part; None if there is no other."""
    digest, left = hashlib.md5(), size
    while left and (chunk := content.read(min(left, _MIB))):
        digest.update(chunk)
        left -= len(chunk)
    return None if left == size else digest.digest()
