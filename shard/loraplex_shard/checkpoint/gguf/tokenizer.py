"""Builds a tokenizer from a GGUF file's metadata, for the one kind that was checked against the original."""

from collections.abc import Mapping
from typing import TypeVar

from gguf.constants import TokenType
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from loraplex_shard.checkpoint.base import CheckpointError, TokenizerFiles
from loraplex_shard.checkpoint.gguf.end_tokens import EOS, end_token_ids
from loraplex_shard.checkpoint.gguf.file import MetadataValue

Metadata = Mapping[str, MetadataValue]
T = TypeVar("T")

_ADDED = TokenType.CONTROL, TokenType.USER_DEFINED
_TEMPLATE = "tokenizer.chat_template"
_SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": EOS,
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",  # GGUF's own spelling
    "pad_token": "tokenizer.ggml.padding_token_id",
    "cls_token": "tokenizer.ggml.cls_token_id",
    "mask_token": "tokenizer.ggml.mask_token_id",
}


def read_tokenizer(metadata: Metadata) -> TokenizerFiles:
    """Raises CheckpointError for a kind of tokenizer that is not known to be rebuilt exactly."""
    kind = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(
            f"GGUF tokenizer with tokenizer.ggml.model {kind[0]!r} and tokenizer.ggml.pre {kind[1]!r} is not served, "
            "only 'gpt2' with 'smollm': serve the checkpoint in its original format"
        )
    tokens = _get(metadata, "tokenizer.ggml.tokens", list)
    merges = [(left, right) for left, right in map(str.split, _get(metadata, "tokenizer.ggml.merges", list))]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = ByteLevelDecoder()
    types = _get(metadata, "tokenizer.ggml.token_type", list)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == TokenType.CONTROL)
            for token, kind in zip(tokens, types, strict=True)
            if kind in _ADDED
        ]
    )
    return TokenizerFiles(
        tokenizer_json=tokenizer.to_str().encode(),
        chat_templates=_chat_templates(metadata),
        special_tokens={
            name: tokens[id]
            for name, key in _SPECIAL.items()
            if isinstance(id := metadata.get(key), int) and 0 <= id < len(tokens)  # llama.cpp ignores others, too
        },
    )


def _chat_templates(metadata: Metadata) -> dict[str, str]:
    """The default one, and those for particular uses, whose keys end with their names."""
    default = {"default": str(metadata[_TEMPLATE])} if _TEMPLATE in metadata else {}
    named = {key: value for key, value in metadata.items() if key.startswith(f"{_TEMPLATE}.")}
    return default | {key.removeprefix(f"{_TEMPLATE}."): str(template) for key, template in named.items()}


def read_end_token_ids(metadata: Metadata) -> tuple[int, ...]:
    return end_token_ids(metadata, _get(metadata, "tokenizer.ggml.tokens", list))


def _get(metadata: Metadata, key: str, kind: type[T]) -> T:
    value = metadata.get(key)
    if not isinstance(value, kind):
        raise CheckpointError(f"GGUF metadata {key} is missing or not of type {kind.__name__}")
    return value
