"""Builds a tokenizer from a GGUF file's metadata. It gives the same tokens as the model's own tokenizer.json."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers.tokenization_utils_base import generate_merges

from loraplex_shard.checkpoint.base import CheckpointError, TokenizerFiles
from loraplex_shard.checkpoint.gguf.end_tokens import EOS, end_token_ids
from loraplex_shard.checkpoint.gguf.file import MetadataValue
from loraplex_shard.checkpoint.gguf.pre_tokenizers import GPT_2, WORDS, Words

Metadata = Mapping[str, MetadataValue]
T = TypeVar("T")

BLANK = "▁"  # SentencePiece's character for a blank
# SentencePiece's special tokens, for files that do not say.
DEFAULT_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}

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
    """Raises CheckpointError for a kind of tokenizer that cannot be rebuilt exactly."""
    kind = str(metadata.get("tokenizer.ggml.model"))
    tokens = _get(metadata, "tokenizer.ggml.tokens", list)
    defaults: Mapping[str, int] = {}
    if kind == "gpt2":
        words = _words(metadata)
        tokenizer, add_bos = _byte_level(tokens, _get(metadata, "tokenizer.ggml.merges", list), words), words.add_bos
    elif kind in ("llama", "gemma4"):
        tokens = _pieces(metadata, tokens)
        tokenizer, add_bos, defaults = _sentencepiece(metadata, tokens), kind == "llama", DEFAULT_IDS
    else:
        raise _unknown("model", kind, "'gpt2', 'llama' and 'gemma4'")
    special = _special_tokens(metadata, tokens, defaults)
    tokenizer.add_tokens(list(_added_tokens(metadata, tokens)))
    _wrap(tokenizer, special, _flag(metadata, "add_bos_token", add_bos), _flag(metadata, "add_eos_token", False))
    return TokenizerFiles(tokenizer.to_str().encode(), _chat_templates(metadata), special)


def read_end_token_ids(metadata: Metadata) -> tuple[int, ...]:
    return end_token_ids(metadata, _get(metadata, "tokenizer.ggml.tokens", list))


def _words(metadata: Metadata) -> Words:
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        raise CheckpointError(
            "GGUF metadata tokenizer.ggml.pre is missing: the file was made before May 2024, and does not say how the "
            "model splits texts into words. Use a newer file of the model"
        )
    if name not in WORDS:
        raise _unknown("pre", name, ", ".join(map(repr, sorted(WORDS))))
    return WORDS[str(name)]


def _unknown(field: str, value: object, known: str) -> CheckpointError:
    return CheckpointError(
        f"GGUF tokenizer with tokenizer.ggml.{field} {value!r} is not served, only {known}: serve the checkpoint in "
        "its original format"
    )


def _byte_level(tokens: list[str], merges: list[str], words: Words) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [_pair(merge) for merge in merges]
    tokenizer = Tokenizer(_bpe(vocabulary, pairs, ignore_merges=words.ignore_merges))
    if words.composes:
        tokenizer.normalizer = normalizers.NFC()
    by_library = words.cuts[-1] == GPT_2  # then the library's own pre-tokenizer does it
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in words.cuts[: -1 if by_library else None]]
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_library)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bpe(vocabulary: dict[str, int], pairs: list[tuple[str, str]], **options: Any) -> BPE:
    try:
        return BPE(vocabulary, pairs, **options)
    except Exception as error:  # the library raises this for a merge of unknown tokens
        raise CheckpointError(f"GGUF metadata tokenizer.ggml.merges does not fit its tokens: {error}") from error


def _pieces(metadata: Metadata, tokens: list[str]) -> list[str]:
    """The tokens as SentencePiece's pieces. Gemma's runs of blanks are stored as blanks."""
    runs = _is_gemma(metadata)
    return [BLANK * len(token) if runs and token and not token.strip(" ") else token for token in tokens]


def _is_gemma(metadata: Metadata) -> bool:
    return str(metadata.get("general.architecture")).startswith("gemma")


def _sentencepiece(metadata: Metadata, pieces: list[str]) -> Tokenizer:
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = metadata.get("tokenizer.ggml.merges")
    if isinstance(merges, list):
        pairs = [_pair(str(merge)) for merge in merges]
    else:
        # Gemma's merges are in the order of its tokens, those of other models in the order of their scores.
        scores = None if _is_gemma(metadata) else _per_token(metadata, "scores", pieces)
        pairs = generate_merges(vocabulary, None if scores is None else dict(zip(pieces, scores, strict=True)))
    unknown = _id(metadata, "unk_token", DEFAULT_IDS["unk_token"])
    unknown_piece = pieces[unknown] if 0 <= unknown < len(pieces) else None
    tokenizer = Tokenizer(_bpe(vocabulary, pairs, unk_token=unknown_piece, fuse_unk=True, byte_fallback=True))
    prefix = _flag(metadata, "add_space_prefix", not _is_gemma(metadata))
    blanks = normalizers.Replace(" ", BLANK)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), blanks]) if prefix else blanks
    undone = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *undone]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _added_tokens(metadata: Metadata, tokens: list[str]) -> Iterable[AddedToken]:
    # Phi-3's special tokens swallow the blanks after them. llama.cpp recognizes this by the model's name, too.
    phi = metadata.get("general.architecture") == "phi3" and metadata.get("tokenizer.ggml.model") == "llama"
    if "tokenizer.ggml.token_type" in metadata:
        types = _per_token(metadata, "token_type", tokens)
    else:  # as in llama.cpp, the tokens with a purpose are then the special ones
        purposes = {metadata.get(key) for key in _SPECIAL.values()}
        types = [TokenType.CONTROL if index in purposes else TokenType.NORMAL for index in range(len(tokens))]
    for token, kind in zip(tokens, types, strict=True):
        if kind in _ADDED:
            strips = phi and token not in ("<unk>", "<s>", "<|endoftext|>")
            yield AddedToken(token, normalized=False, special=kind == TokenType.CONTROL, rstrip=strips)


def _per_token(metadata: Metadata, name: str, tokens: list[str]) -> list[Any]:
    values: list[Any] = _get(metadata, f"tokenizer.ggml.{name}", list)
    if len(values) != len(tokens):
        raise CheckpointError(
            f"GGUF metadata tokenizer.ggml.{name} has {len(values)} entries, but there are {len(tokens)} tokens"
        )
    return values


def _wrap(tokenizer: Tokenizer, special: Mapping[str, str], bos: bool, eos: bool) -> None:
    """Makes the tokenizer begin and end texts with these tokens."""
    first = [special["bos_token"]] if bos and "bos_token" in special else []
    last = [special["eos_token"]] if eos and "eos_token" in special else []
    if first or last:
        ids = [(token, tokenizer.token_to_id(token)) for token in {*first, *last}]
        tokenizer.post_processor = TemplateProcessing(single=[*first, "$0", *last], special_tokens=ids)


def _special_tokens(metadata: Metadata, tokens: list[str], defaults: Mapping[str, int]) -> dict[str, str]:
    ids = {name: _id(metadata, name, defaults.get(name, -1)) for name in _SPECIAL}
    return {name: tokens[id] for name, id in ids.items() if 0 <= id < len(tokens)}  # llama.cpp ignores other ids, too


def _id(metadata: Metadata, name: str, default: int) -> int:
    id = metadata.get(_SPECIAL[name], default)
    return id if isinstance(id, int) else default


def _flag(metadata: Metadata, name: str, default: bool) -> bool:
    return bool(metadata.get(f"tokenizer.ggml.{name}", default))


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _chat_templates(metadata: Metadata) -> dict[str, str]:
    """The default template, and the named ones, whose keys end with their names."""
    default = {"default": str(metadata[_TEMPLATE])} if _TEMPLATE in metadata else {}
    named = {key: value for key, value in metadata.items() if key.startswith(f"{_TEMPLATE}.")}
    return default | {key.removeprefix(f"{_TEMPLATE}."): str(template) for key, template in named.items()}


def _get(metadata: Metadata, key: str, kind: type[T]) -> T:
    value = metadata.get(key)
    if not isinstance(value, kind):
        raise CheckpointError(f"GGUF metadata {key} is missing or not of type {kind.__name__}")
    return value
