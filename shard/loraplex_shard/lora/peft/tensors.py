"""Reads the tensors of a safetensors file that is already in memory, without copying them. GGUF files go to
gguf_tensors.py.

The library's own readers either map the file, and the process is killed if a mapped file shrinks; or they copy it while
they hold the interpreter's lock, which delays the steps of running sequences.
"""

import io
import json
from typing import IO, Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.gguf_metadata import MAGIC, MAX_HEADER_BYTES

_MAX_HEADER_BYTES = 4 * 2**20
_POINTER = b"version "  # the beginning of a Git LFS pointer, which a clone without Git LFS leaves in place of the file
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

_Count = Annotated[int, Field(ge=0, le=2**40)]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    dtype: str
    shape: list[_Count]
    data_offsets: Annotated[list[_Count], Field(min_length=2, max_length=2)]


_HEADER = TypeAdapter(dict[str, _Entry])


def read_tensors(data: memoryview) -> dict[str, torch.Tensor]:
    """Returns the tensors by name. They are views of `data`.

    Raises AdapterInvalidError if the file is cut short or malformed, or if a tensor does not have a float dtype.
    """
    if data[: len(MAGIC)] == MAGIC:
        from loraplex_shard.lora.peft import gguf_tensors

        return gguf_tensors.read_tensors(data)
    start, entries = _read_header(io.BytesIO(data[: 8 + _MAX_HEADER_BYTES]), len(data))
    return {name: _view(data, start, entry) for name, entry in entries.items()}


def read_shapes(file: IO[bytes], size: int) -> dict[str, torch.Tensor]:
    """Checks a file of `size` bytes as far as its header allows. Returns its tensors, by name, without their values: on
    the meta device. Raises what read_tensors raises."""
    if (beginning := file.read(len(MAGIC))) == MAGIC:
        from loraplex_shard.lora.peft import gguf_tensors

        return gguf_tensors.read_shapes(memoryview(beginning + file.read(MAX_HEADER_BYTES)), size)
    file.seek(0)
    _, entries = _read_header(file, size)
    return {
        name: torch.empty(entry.shape, dtype=_DTYPES[entry.dtype], device="meta") for name, entry in entries.items()
    }


def _read_header(file: IO[bytes], size: int) -> tuple[int, dict[str, _Entry]]:
    """Returns where the header ends, and its entries."""
    if size < 8:
        raise AdapterInvalidError(f"adapter_model.safetensors is cut short: it has {size} bytes")
    beginning = file.read(8)
    if beginning == _POINTER:
        raise AdapterInvalidError("adapter_model.safetensors is a Git LFS pointer: run `git lfs pull` there")
    header_size = int.from_bytes(beginning, "little")
    start = 8 + header_size
    if header_size > _MAX_HEADER_BYTES:
        raise AdapterInvalidError("adapter_model.safetensors is not a safetensors file: its header would be too large")
    if start > size:
        raise AdapterInvalidError("adapter_model.safetensors is cut short: its header is incomplete")
    entries = _parse_header(file.read(header_size))
    _check_extents(entries, size - start)
    return start, entries


def _parse_header(header: bytes) -> dict[str, _Entry]:
    try:
        fields = json.loads(header)
        if isinstance(fields, dict):
            fields.pop("__metadata__", None)
        return _HEADER.validate_python(fields)
    except (ValueError, RecursionError, ValidationError):
        raise AdapterInvalidError(
            "adapter_model.safetensors is not a safetensors file: its header is malformed"
        ) from None


def _check_extents(entries: dict[str, _Entry], size: int) -> None:
    """Checks that the tensors follow one another without gaps, up to the end of the file."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in _DTYPES:
            raise AdapterInvalidError(
                f"adapter_model.safetensors: {name} has dtype {entry.dtype[:20]}, which is not a float"
            )
        expected = _numel(entry) * _DTYPES[entry.dtype].itemsize
        if entry.data_offsets != [end, end + expected]:
            raise AdapterInvalidError(f"adapter_model.safetensors is malformed: {name} does not fit its shape")
        end += expected
    if end > size:
        raise AdapterInvalidError(f"adapter_model.safetensors is cut short: {end - size} bytes are missing at its end")
    if end < size:
        raise AdapterInvalidError(
            f"adapter_model.safetensors is malformed: {size - end} bytes do not belong to a tensor"
        )


def _view(data: memoryview, start: int, entry: _Entry) -> torch.Tensor:
    dtype, count = _DTYPES[entry.dtype], _numel(entry)
    if count == 0:  # torch.frombuffer does not take an empty range
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start + entry.data_offsets[0]).view(entry.shape)


def _numel(entry: _Entry) -> int:
    count = 1
    for dimension in entry.shape:
        count *= dimension
    return count
