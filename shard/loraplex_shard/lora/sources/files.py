"""The files of an adapter, read whole into memory. Knows nothing about their origin or their tensors."""

import hashlib
import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.sources.model_config import MAX_MODEL_CONFIG, MODEL_CONFIG, ModelConfig, read_model_config
from loraplex_shard.lora.sources.other_forms import is_other, why_no_adapter
from loraplex_shard.lora.sources.text_files import MAX_TEMPLATE, TEXT_SIZE_LIMITS, AdapterText, read_text, text_files

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MLX_TENSORS = "adapters.safetensors"
GGUF = ".gguf"  # the end of the name of llama.cpp's file, which has everything

# The largest size of each file that is read or fetched, in bytes.
SIZE_LIMITS = {
    CONFIG: 2**20,
    TENSORS: 4 * 2**30,
    MLX_TENSORS: 4 * 2**30,
    MODEL_CONFIG: MAX_MODEL_CONFIG,
    **TEXT_SIZE_LIMITS,
}
# The files that can be asked for by name.
KNOWN = (CONFIG, TENSORS, PICKLE, MLX_TENSORS, MODEL_CONFIG, *TEXT_SIZE_LIMITS)

_CHUNK = 2**24


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The content of an adapter's files. Its digest is the adapter's identity."""

    config: bytes  # empty beside a GGUF file
    tensors: memoryview  # mutable, so that the adapter's tensors can be views of it
    text: AdapterText = field(default_factory=AdapterText)
    model_config: ModelConfig = field(default_factory=ModelConfig)

    def digest(self) -> str:
        """The sha256, in hex, of the config, the tensors, the text content and what a model's config says, if there are
        any, each preceded by its length (8 bytes, little endian)."""
        digest = hashlib.sha256()
        parts: list[bytes | memoryview] = [self.config, self.tensors]
        parts += [content for content in (self.text.content, self.model_config.content) if content]
        for data in parts:
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()


def choose(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Chooses the files to be read from an adapter's folder, given by name and size in bytes.

    Raises AdapterInvalidError if the files are not an adapter, or if one is too large.
    """
    tensors = check_names(frozenset(sizes))
    said = () if tensors.endswith(GGUF) else (CONFIG,)
    names = (*said, tensors, *({MODEL_CONFIG} & sizes.keys()), *text_files(sizes))
    for name in names:
        check_size(name, sizes[name])
    return names


def is_telling(name: str) -> bool:
    """Whether a file with this name matters for an adapter."""
    return name in KNOWN or name.endswith(GGUF) or bool(text_files([name])) or is_other(name)


def assemble(contents: Mapping[str, memoryview]) -> AdapterFiles:
    """Makes an adapter's files from their contents, given by name."""
    tensors = check_names(frozenset(contents))
    text = {name: bytes(data) for name, data in contents.items() if name not in (CONFIG, tensors, MODEL_CONFIG)}
    said = read_model_config(bytes(contents.get(MODEL_CONFIG, b"{}")))
    return AdapterFiles(bytes(contents.get(CONFIG, b"")), contents[tensors], read_text(text), said)


def check_size(name: str, size: int) -> None:
    """Raises AdapterInvalidError if `size` bytes are too many for an adapter's file with this name."""
    limit = SIZE_LIMITS[TENSORS] if name.endswith(GGUF) else SIZE_LIMITS.get(name, MAX_TEMPLATE)
    if size > limit:
        raise AdapterInvalidError(f"{name} has {size} bytes; the limit is {limit}")


def check_names(names: frozenset[str]) -> str:
    """Returns which of these files has the tensors. Raises AdapterInvalidError if they are not an adapter."""
    files = sorted(name for name in names if name.endswith(GGUF))
    if files and names.isdisjoint((TENSORS, MLX_TENSORS)):
        if len(files) > 1:
            raise AdapterInvalidError(f"{files[0]} and {files[1]}: put each GGUF file into a folder of its own")
        return files[0]
    if CONFIG not in names:
        beside = next((f"PEFT writes it beside {name}" for name in (TENSORS, PICKLE) if name in names), "")
        reason = beside or why_no_adapter(names) or "this is not an adapter of PEFT, MLX-LM or llama.cpp"
        raise AdapterInvalidError(f"{CONFIG} is missing: {reason}")
    for name in TENSORS, MLX_TENSORS:
        if name in names:
            return name
    reason = why_no_adapter(names)
    raise AdapterInvalidError(f"{TENSORS} is missing{reason and ': '}{reason}")


def check_kind(name: str, mode: int) -> None:
    """Raises AdapterInvalidError unless `mode`, as of os.stat, is a regular file's."""
    if not stat.S_ISREG(mode):
        raise AdapterInvalidError(f"{name} is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}: replace it")


def read_file(path: Path, name: str) -> memoryview:
    """Reads a file. Raises AdapterInvalidError if it is too large or not a regular file, OSError if it cannot be
    read."""
    # Without O_NONBLOCK, opening a pipe would wait for its writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        check_kind(name, status.st_mode)
        check_size(name, status.st_size)
        data, filled = new_buffer(status.st_size), 0
        while filled < len(data) and (count := file.readinto(data[filled : filled + _CHUNK])):
            filled += count
        return data[:filled]  # shorter if the file has shrunk meanwhile


def new_buffer(size: int) -> memoryview:
    """Memory for a file. Its pages are allocated when they are written. A bytearray would be filled with zeros first,
    and steps would have to wait for that."""
    return memoryview(mmap.mmap(-1, max(size, 1)))[:size]
