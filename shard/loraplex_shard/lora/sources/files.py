"""The files of an adapter, read whole into memory. Knows neither what is in its tensors nor where they come from."""

import hashlib
import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.sources.text_files import MAX_TEMPLATE, TEXT_SIZE_LIMITS, AdapterText, read_text, text_files

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MLX_TENSORS = "adapters.safetensors"

# The largest of each that is read or fetched, in bytes.
SIZE_LIMITS = {CONFIG: 2**20, TENSORS: 4 * 2**30, **TEXT_SIZE_LIMITS}
# Those that a folder can be asked for by name.
KNOWN = (CONFIG, TENSORS, PICKLE, MLX_TENSORS, *TEXT_SIZE_LIMITS)

_CHUNK = 2**24


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What an adapter is: its digest is its identity."""

    config: bytes
    tensors: memoryview  # views of it become the adapter's tensors without a copy, which takes a mutable buffer
    text: AdapterText = field(default_factory=AdapterText)

    def digest(self) -> str:
        """sha256 over the config, the tensors and what there is of text, each after its length (8 bytes, little
        endian), in hex."""
        digest = hashlib.sha256()
        text = self.text.content
        for data in (self.config, self.tensors, text) if text else (self.config, self.tensors):
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()


def choose(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Of the files that an adapter's folder has, by name and in bytes, those that are read.

    Raises AdapterInvalidError if they do not make an adapter, or one is too large.
    """
    check_names(frozenset(sizes))
    names = (CONFIG, TENSORS, *text_files(sizes))
    for name in names:
        check_size(name, sizes[name])
    return names


def is_telling(name: str) -> bool:
    """Whether a file of this name has a say in what an adapter is."""
    return name in KNOWN or bool(text_files([name]))


def assemble(contents: Mapping[str, memoryview]) -> AdapterFiles:
    """Of the files' contents, by name."""
    text = {name: bytes(data) for name, data in contents.items() if name not in (CONFIG, TENSORS)}
    return AdapterFiles(bytes(contents[CONFIG]), contents[TENSORS], read_text(text))


def check_size(name: str, size: int) -> None:
    """Raises AdapterInvalidError if an adapter's file of this name may not have this many bytes."""
    limit = SIZE_LIMITS.get(name, MAX_TEMPLATE)
    if size > limit:
        raise AdapterInvalidError(f"{name} has {size} bytes; the limit is {limit}")


def check_names(names: frozenset[str]) -> None:
    """Raises AdapterInvalidError if these names of files do not make an adapter."""
    if MLX_TENSORS in names and TENSORS not in names:
        raise AdapterInvalidError(f"{MLX_TENSORS} is in MLX-LM's format, not in PEFT's: convert the adapter")
    if CONFIG not in names:
        raise AdapterInvalidError(f"{CONFIG} is missing: this is not a PEFT adapter")
    if TENSORS not in names and PICKLE in names:
        raise AdapterInvalidError(
            f"{PICKLE} is a pickle file, which could run any code: save the adapter with safetensors instead"
            " (PEFT: save_pretrained(..., safe_serialization=True))"
        )
    if TENSORS not in names:
        raise AdapterInvalidError(f"{TENSORS} is missing")


def read_file(path: Path, name: str) -> memoryview:
    """Raises AdapterInvalidError if it is too large or not a regular file, else OSError."""
    # Without O_NONBLOCK, opening a pipe would wait for its writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise AdapterInvalidError(f"{name} is not a regular file")
        check_size(name, status.st_size)
        data, filled = new_buffer(status.st_size), 0
        while filled < len(data) and (count := file.readinto(data[filled : filled + _CHUNK])):
            filled += count
        return data[:filled]  # less if the file shrank meanwhile


def new_buffer(size: int) -> memoryview:
    """Memory for a file. Its pages come as they are written: a bytearray is filled with zeros first, and no step can
    begin until that is done."""
    return memoryview(mmap.mmap(-1, max(size, 1)))[:size]
