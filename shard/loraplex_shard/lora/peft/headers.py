"""What the headers of an adapter's files say, without the values of its tensors."""

from collections.abc import Mapping
from pathlib import Path

import torch

from loraplex_shard.lora.peft.config import AdapterConfig
from loraplex_shard.lora.peft.gguf_metadata import MAGIC, MAX_HEADER_BYTES, read_metadata
from loraplex_shard.lora.peft.parsing import parse_config
from loraplex_shard.lora.peft.tensors import read_shapes
from loraplex_shard.lora.sources.files import CONFIG, check_names, read_file


def read_headers(paths: Mapping[str, Path]) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """The configuration, and the tensors, on the meta device, of an adapter whose files are given by name. Raises
    AdapterInvalidError, or OSError if a file cannot be read."""
    name = check_names(frozenset(paths))
    with paths[name].open("rb") as file:
        shapes = read_shapes(file, paths[name].stat().st_size)
        file.seek(0)
        beginning = file.read(len(MAGIC))
        if beginning == MAGIC:
            return parse_config(read_metadata(memoryview(beginning + file.read(MAX_HEADER_BYTES)))), shapes
    return parse_config(bytes(read_file(paths[CONFIG], CONFIG))), shapes
