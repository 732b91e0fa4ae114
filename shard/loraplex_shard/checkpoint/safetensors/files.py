"""The safetensors files of a checkpoint directory, as one set of tensors. Knows nothing about models."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loraplex_shard.checkpoint.base import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BACKBONE, BARE = "model.", ("embed_tokens.", "layers.", "norm.")


class SafetensorsFiles:
    """Raises CheckpointError if there are no such files, or if one is missing or cut short."""

    def __init__(self, directory: Path, model_id: str) -> None:
        self._directory = directory
        self._model_id = model_id
        self._files: dict[str, Any] = {}
        for file in self._file_names():
            self._add(file, self._open(file))
        # Embedding models were saved without a head, so their names lack the prefix that the head does not have.
        self._own = {BACKBONE + name if name.startswith(BARE) else name: name for name in self._files}

    @property
    def names(self) -> frozenset[str]:
        """The tensors' names, as transformers has them in a model with a head."""
        return frozenset(self._own)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """safetensors' name for the dtype, for example "BF16" or "I32"."""
        return str(self._slice(name).get_dtype())

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """Reads a part of a tensor's first two dimensions, and only that part, from the file."""
        part = self._slice(name)
        dimensions = len(part.get_shape())
        tensor: torch.Tensor = part[(rows, columns)[:dimensions] or ...]
        return tensor

    def _slice(self, name: str) -> Any:
        own = self._own[name]
        return self._files[own].get_slice(own)

    def _add(self, name: str, file: Any) -> None:
        """Adds a file's tensors. A tensor may be in several files if it is the same in all of them."""
        for tensor in file.keys():  # noqa: SIM118
            former = self._files.setdefault(tensor, file)
            if former is not file and not torch.equal(former.get_tensor(tensor), file.get_tensor(tensor)):
                raise CheckpointError(f"{self._model_id}: {tensor} is in several files, and differs in {name}")

    def _file_names(self) -> list[str]:
        """Chooses the files as transformers does: a single file, or else the files of an index. If there is neither,
        files that are named like parts of a model are used, as in vLLM."""
        if (self._directory / SINGLE_FILE).is_file():
            return [SINGLE_FILE]
        if (self._directory / INDEX_FILE).is_file():
            files = read_json(self._directory / INDEX_FILE, self._model_id).get("weight_map", {}).values()
            return sorted(set(files))
        if parts := sorted(path.name for path in self._directory.glob("model*.safetensors")):
            return parts
        raise CheckpointError(
            f"{self._model_id}: neither {SINGLE_FILE} nor {INDEX_FILE}. Pickled weights (*.bin, *.pt) are not read; "
            "convert them with transformers: AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"
        )

    def _open(self, file: str) -> Any:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{self._model_id}: {INDEX_FILE} names {file!r}: it must be a safetensors file beside it"
            )
        try:
            return safe_open(self._directory / file, framework="pt")
        except FileNotFoundError as error:
            raise CheckpointError(f"{self._model_id}: {file} is missing") from error
        except (OSError, SafetensorError) as error:
            if is_pointer(self._directory / file):
                raise CheckpointError(
                    f"{self._model_id}: {file} is not the file itself but a Git LFS pointer: run `git lfs pull` there"
                ) from error
            raise CheckpointError(f"{self._model_id}: {file} is not a readable safetensors file: {error}") from error


def is_pointer(path: Path) -> bool:
    """Whether this is a Git LFS pointer, which a clone without Git LFS leaves in place of the file."""
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs.github.com/")


def read_json(path: Path, model_id: str) -> dict[str, Any]:
    """Reads a JSON object. Raises CheckpointError if the file is something else."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{model_id}: {path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{model_id}: {path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{model_id}: {path.name} is not a JSON object")
    return content
