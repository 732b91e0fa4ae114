"""Reads a GGUF file's header: its metadata, and where each tensor is. Knows nothing about models.

The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. The constants come from the `gguf` package. Its reader is
not used: it takes seconds for a tokenizer's vocabulary, since it wraps each of the hundred thousand strings in arrays.
"""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd, prod
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from loraplex_shard.checkpoint.base import CheckpointError

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
ByteRows = np.ndarray[tuple[int, int], np.dtype[np.uint8]]
MetadataValue = int | float | bool | str | list["MetadataValue"]

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_VERSIONS = (2, 3)
_ROWS_AT_A_TIME = 32
_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")  # as llama.cpp's gguf-split names parts


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file. `data` is mapped, not read: [rows, bytes per row]."""

    shape: tuple[int, ...]  # rows first, as in torch
    kind: GGMLQuantizationType
    data: ByteRows


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is in a file."""

    name: str
    shape: tuple[int, ...]  # rows first, as in torch
    kind: GGMLQuantizationType
    offset: int  # from where the tensors begin

    @property
    def row_bytes(self) -> int:
        weights_per_unit, bytes_per_unit = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // weights_per_unit * bytes_per_unit

    @property
    def end(self) -> int:
        return self.offset + prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True, slots=True)
class GgufHeader:
    metadata: dict[str, MetadataValue]
    places: tuple[Place, ...]
    data: int  # where the tensors begin


@dataclass(frozen=True, slots=True)
class GgufFile:
    metadata: dict[str, MetadataValue]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Reads a file. If the model was split into several files, `path` may be any of them, and all are read; the first
    one has the metadata.

    Raises CheckpointError if a file is not GGUF or is cut short, or if a part is missing.
    """
    split = _PART.fullmatch(path.name)
    if split is None:
        return _read_one(path)
    stem, count = split["stem"], int(split["count"])
    parts = [path.with_name(f"{stem}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise CheckpointError(f"{part.name} is missing: the model was split into {count} files")
    first, *others = map(_read_one, parts)
    return GgufFile(first.metadata, first.tensors | {n: t for other in others for n, t in other.tensors.items()})


def _read_one(path: Path) -> GgufFile:
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path.name}: the file is empty")
    content: Bytes = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # still mapped, without memmap's overhead
    return read_content(content, path.name)


def read_content(content: Bytes, name: str) -> GgufFile:
    """The same for the content of a file, whose name is for errors."""
    with _readable(name):
        header = read_header(content.data, name)
        tensors = {each.name: _tensor(content[header.data + each.offset :], each) for each in header.places}
        return GgufFile(header.metadata, tensors)


def read_header(content: memoryview, name: str) -> GgufHeader:
    """Reads a header from the beginning of a file. Raises CheckpointError as read_gguf does."""
    with _readable(name):
        return _read_header(content)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (struct.error, ValueError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{name}: not a readable GGUF file, or cut short: {error}") from error


def floats(data: ByteRows, kind: GGMLQuantizationType) -> torch.Tensor:
    """Dequantizes rows: [rows, weights per row] float32."""
    rows = data.shape[0]
    # dequantize() does a few rows at a time. Joined rows, which are longer, are several times faster.
    try:
        weights = dequantize(data.reshape(rows // gcd(rows, _ROWS_AT_A_TIME), -1), kind)
    except NotImplementedError as error:
        raise CheckpointError(f"{kind.name} cannot be dequantized: use a file in another quantization") from error
    # Float32 tensors are views of the file, which is mapped read-only, so they are copied.
    return torch.from_numpy(weights if weights.flags.writeable else weights.copy()).reshape(rows, -1)


def _read_header(content: memoryview) -> GgufHeader:
    header = _Header(content)
    magic, version = header.unpack("II")
    if magic != GGUF_MAGIC or version not in _VERSIONS:
        raise ValueError(f"magic {magic:#x}, version {version}; expected little-endian GGUF of version 2 or 3")
    tensors, pairs = header.unpack("QQ")
    metadata = {header.string(): header.value() for _ in range(pairs)}
    places = tuple(header.place() for _ in range(tensors))
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment {alignment!r}")
    return GgufHeader(metadata, places, -(-header.offset // alignment) * alignment)


def _tensor(content: Bytes, place: Place) -> GgufTensor:
    rows = prod(place.shape[:-1])
    data = content[: rows * place.row_bytes]
    if len(data) != rows * place.row_bytes:
        raise ValueError(f"tensor {place.name} ends after the end of the file")
    return GgufTensor(place.shape, place.kind, data.reshape(rows, place.row_bytes))


class _Header:
    """A cursor over the header."""

    def __init__(self, content: memoryview) -> None:
        self.content = content
        self.offset = 0

    def unpack(self, layout: str) -> tuple[int, ...]:
        values = struct.unpack_from(f"<{layout}", self.content, self.offset)
        self.offset += struct.calcsize(f"<{layout}")
        return values

    def string(self) -> str:
        (length,) = self.unpack("Q")
        return bytes(self.unpack(f"{length}s")[0]).decode()

    def value(self) -> MetadataValue:
        return self._typed(GGUFValueType(self.unpack("I")[0]))

    def _typed(self, kind: GGUFValueType) -> MetadataValue:
        if kind is GGUFValueType.STRING:
            return self.string()
        if kind is not GGUFValueType.ARRAY:
            return self.unpack(_SCALARS[kind])[0]
        item, length = GGUFValueType(self.unpack("I")[0]), self.unpack("Q")[0]
        if item in _SCALARS:
            return list(self.unpack(f"{length}{_SCALARS[item]}"))
        return [self._typed(item) for _ in range(length)]

    def place(self) -> Place:
        name = self.string()
        (dimensions,) = self.unpack("I")
        shape = self.unpack(f"{dimensions}Q")[::-1]
        kind, offset = GGMLQuantizationType(self.unpack("I")[0]), self.unpack("Q")[0]
        return Place(name, shape, kind, offset)
