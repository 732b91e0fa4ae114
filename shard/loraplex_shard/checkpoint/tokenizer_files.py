"""Reads a checkpoint's tokenizer, in any format, as a tokenizer that a tokenizer.json can hold.

A tokenizer.json is read as transformers reads it. Other formats are converted by transformers, and the result is tried
on a text, because a conversion that does not fit its file silently gives other tokens.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import generate_merges
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.checkpoint.safetensors.files import read_json

# A text of characters that every vocabulary has.
PROBE = "The server reads 12345 names,\nthen it answers:  all (of them)."
WORDS = 12  # this many tokens at its end contain the two blanks
NAMES = "tokenizer.json", "tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json", "merges.txt"
HINT = "Save a tokenizer.json beside config.json: AutoTokenizer.from_pretrained(SOURCE).save_pretrained(DIRECTORY)"
CACHE = "TIKTOKEN_CACHE_DIR"


def read_tokenizer(directory: Path, model_id: str, model_type: str) -> Any:
    """Returns a tokenizer of transformers that is backed by the `tokenizers` library.

    `model_type` comes from config.json. Raises CheckpointError if there is no tokenizer, or if it cannot be converted
    exactly.
    """
    found = [name for name in NAMES if (directory / name).is_file()]
    if not found:
        raise CheckpointError(f"{model_id}: no tokenizer can be read: there is none of {', '.join(NAMES)}")
    try:
        with _without_cache():
            tokenizer = _read(directory, model_type)
    except CheckpointError as error:
        raise CheckpointError(f"{model_id}: {error.message}") from error
    except Exception as error:  # transformers and tokenizers raise many kinds for unexpected files
        reason = str(error).strip().partition("\n")[0].removesuffix(" from one of: ")
        message = f"{model_id}: no tokenizer can be read from {', '.join(found)}: {reason}. {HINT}"
        raise CheckpointError(message) from error
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(f"{model_id}: its tokenizer cannot be expressed as a tokenizer.json")
    return tokenizer


def _read(directory: Path, model_type: str) -> Any:
    if (directory / "tokenizer.json").is_file():
        return _load(AutoTokenizer, directory)
    for name in ("tokenizer.model", "tiktoken.model"):
        if (directory / name).is_file():
            processor = _sentencepiece(directory / name)
            return _from_tiktoken(directory, name, model_type) if processor is None else _from_spm(directory, processor)
    if (directory / "tekken.json").is_file():  # of Mistral models; texts begin with <s>, which the file does not say
        tokenizer = _load(AutoTokenizer, directory, bos_token="<s>", eos_token="</s>", add_bos_token=True)
    else:
        tokenizer = _load(AutoTokenizer, directory)
    return _tried(tokenizer)


def _load(kind: Any, directory: Path, **options: Any) -> Any:
    return kind.from_pretrained(directory, trust_remote_code=False, **options)


def _tried(tokenizer: Any) -> Any:
    """Returns the tokenizer. Raises CheckpointError if the tokens of a text do not decode to that text."""
    if tokenizer.decode(tokenizer.encode(PROBE, add_special_tokens=False)) != PROBE:
        raise CheckpointError(f"its tokenizer's files are not what {type(tokenizer).__name__} reads. {HINT}")
    return tokenizer


def _sentencepiece(file: Path) -> Any:
    """Reads the file with the sentencepiece library; None if it has another format."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{file.name} needs the package sentencepiece: pip install 'loraplex[shard]'") from error
    try:
        return SentencePieceProcessor(model_proto=file.read_bytes())
    except RuntimeError:
        return None


def _from_spm(directory: Path, processor: Any) -> Any:
    config = directory / "tokenizer_config.json"
    said = read_json(config, config.name) if config.is_file() else {}
    # In the first Llama checkpoints, the configured special tokens are empty texts.
    ids = {"unk_token": processor.unk_id(), "bos_token": processor.bos_id(), "eos_token": processor.eos_id()}
    options = {key: processor.id_to_piece(id) for key, id in ids.items() if said.get(key) == "" and id >= 0}
    if said.get("add_bos_token") is None:  # transformers 4 wrote it only if it was not the default
        options["add_bos_token"] = processor.bos_id() >= 0
    tokenizer = _load(AutoTokenizer, directory, **options)
    if type(tokenizer) is TokenizersBackend or not _agree(tokenizer, processor):
        # transformers has no class for it, or the wrong one, and leaves out the steps before the vocabulary.
        tokenizer = _load(TokenizersBackend, directory, **options)
        _prepare_as(processor, tokenizer.backend_tokenizer, said)
    if not _agree(tokenizer, processor):
        raise CheckpointError(f"tokenizer.model cannot be converted exactly for {type(tokenizer).__name__}. {HINT}")
    return tokenizer


def _agree(tokenizer: Any, processor: Any) -> bool:
    """Whether both give the same tokens. The beginning of the text is left out, since tokenizer_config.json decides
    whether a blank is put before a text."""
    theirs: list[int] = processor.encode(PROBE)
    ours: list[int] = tokenizer.encode(PROBE, add_special_tokens=False)
    return ours[-WORDS:] == theirs[-WORDS:]


def _prepare_as(processor: Any, backend: Tokenizer, said: Mapping[str, Any]) -> None:
    """Makes a tokenizer prepare texts as SentencePiece does before it looks for pieces, and undo it when it decodes. If
    `legacy` is false in the tokenizer's configuration, `said`, no blank is put before what follows a special token."""
    messages: Any = import_module("sentencepiece.sentencepiece_model_pb2")  # generated by protobuf, without types
    proto = messages.ModelProto.FromString(processor.serialized_model_proto())
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        backend.model = _merging_by_score(processor)
    spec = proto.normalizer_spec
    prefix = spec.add_dummy_prefix if said.get("add_prefix_space") is None else bool(said["add_prefix_space"])
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix and said.get("legacy") is False:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    else:
        steps += [normalizers.Prepend("▁")] if prefix else []
        steps.append(normalizers.Replace(" ", "▁"))
    backend.normalizer = normalizers.Sequence(steps)
    undone = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *undone])


def _merging_by_score(processor: Any) -> BPE:
    """Builds merges in the order of the pieces' scores. transformers uses the order of their numbers, which differs if
    runs of blanks come last, as in the first Llama and Mistral models."""
    ids = range(processor.piece_size())
    vocabulary = {processor.id_to_piece(id): id for id in ids}
    merges = generate_merges(vocabulary, {processor.id_to_piece(id): processor.get_score(id) for id in ids})
    unknown, bytes_known = processor.id_to_piece(processor.unk_id()), any(map(processor.is_byte, ids))
    return BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bytes_known)


def _from_tiktoken(directory: Path, name: str, model_type: str) -> Any:
    """Reads a file in tiktoken's format, which says neither how a text is split into words nor what the special tokens
    are."""
    if model_type != "llama":
        raise CheckpointError(f"{name} has tiktoken's format, which is read for Llama 3 only. {HINT}")
    tokenizer = _load(AutoTokenizer, directory, add_bos_token=True)
    if not tokenizer.bos_token or not tokenizer.eos_token:
        raise CheckpointError(
            f"{name} needs a tokenizer_config.json with added_tokens_decoder, bos_token and eos_token"
        )
    return _tried(tokenizer)


@contextmanager
def _without_cache() -> Iterator[None]:
    """Turns off tiktoken's cache. It is a shared folder, keyed by a file's path alone, and may have an older file."""
    before = os.environ.get(CACHE)
    os.environ[CACHE] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[CACHE]
        else:
            os.environ[CACHE] = before
