"""Tokenizers without a tokenizer.json are converted to the same ids, or refused by name."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from loraplex_shard.checkpoint import CheckpointError, open_checkpoint
from tests.shard.decoders import save_checkpoint

TEXTS = (
    "Hello world",
    "two  blanks, a\ttab\nand lines\n\n",
    "Größe 日本語 🙂",
    "def f(x):\n    return x + 12345",
    "a trailing blank ",
)
CORPUS = (Path(__file__).parents[2] / "README.md").read_text()
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def small(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    return kind(vocab_size=700, num_attention_heads=2, num_key_value_heads=1, **sizes)


def train(path: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """Trained like the first Llama's: BPE with byte fallback, digits separate, and spaces kept."""
    corpus = path.with_suffix(".txt")
    corpus.write_text(CORPUS)
    llama: dict[str, Any] = {
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(path.with_suffix("")), vocab_size=600, minloglevel=2, **llama | options
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def checkpoint(directory: Path, kind: type[PreTrainedConfig], settings: Mapping[str, object] | None = None) -> Path:
    save_checkpoint(small(kind), directory)
    if settings is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def read(directory: Path) -> Tokenizer:
    return Tokenizer.from_str(open_checkpoint(str(directory)).tokenizer().tokenizer_json.decode())


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig])
@pytest.mark.parametrize("settings", [None, LLAMA, LLAMA | {"tokenizer_class": "LLaMATokenizer", "bos_token": ""}])
def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece(
    tmp_path: Path, kind: type[PreTrainedConfig], settings: dict[str, str] | None
) -> None:
    directory = checkpoint(tmp_path, kind, settings)
    processor = train(directory / "tokenizer.model")
    tokenizer = read(directory)
    for text in TEXTS:
        assert ids(tokenizer, text) == processor.encode(text)
        assert tokenizer.decode(ids(tokenizer, text)) == text
    assert tokenizer.encode("Hello").ids[0] == processor.bos_id()
    assert open_checkpoint(str(directory)).tokenizer().special_tokens["bos_token"] == "<s>"


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig])
@pytest.mark.parametrize("settings", [None, LLAMA])
def test_pieces_merge_by_their_scores_and_not_their_ids(
    tmp_path: Path, kind: type[PreTrainedConfig], settings: dict[str, str] | None
) -> None:
    """In the first Llama's and Mistral's files, runs of spaces have the first ids and are merged last."""
    directory = checkpoint(tmp_path, kind, settings)
    train(directory / "tokenizer.model")
    proto = sentencepiece_model_pb2.ModelProto.FromString((directory / "tokenizer.model").read_bytes())
    runs = [piece for piece in proto.pieces if len(piece.piece) > 1 and not piece.piece.strip("▁")]
    assert runs
    for piece in runs:
        piece.score = -1e9
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString())
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    tokenizer = read(directory)
    for text in (*TEXTS, "a   b     c", "x\n    y\n        z"):
        assert ids(tokenizer, text) == processor.encode(text)


def test_a_model_that_adds_no_space_before_a_text_still_adds_none(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, MistralConfig)
    processor = train(directory / "tokenizer.model", add_dummy_prefix=False)
    assert [ids(read(directory), text) for text in TEXTS] == [processor.encode(text) for text in TEXTS]


@pytest.mark.parametrize("legacy", [True, False])
def test_text_after_a_special_token_follows_the_configuration(tmp_path: Path, legacy: bool) -> None:
    directory = checkpoint(tmp_path, MistralConfig, {**LLAMA, "legacy": legacy})
    processor = train(directory / "tokenizer.model")
    with_blank, without = processor.encode("in"), processor.encode("\nin")[2:]
    assert ids(read(directory), "<s>in") == [1, *(with_blank if legacy else without)]
    assert [ids(read(directory), text) for text in TEXTS] == [processor.encode(text) for text in TEXTS]


def test_tokens_added_to_a_sentencepiece_model_have_the_next_ids(tmp_path: Path) -> None:
    added = {"600": {"content": "<|im_end|>", "special": True}}
    directory = checkpoint(tmp_path, LlamaConfig, {**LLAMA, "eos_token": "<|im_end|>", "added_tokens_decoder": added})
    train(directory / "tokenizer.model")
    assert ids(read(directory), "Hi<|im_end|>")[-1] == 600
    assert set(open_checkpoint(str(directory)).end_token_ids) == {2, 600}


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config])
@pytest.mark.parametrize("bytes_known", [True, False])
def test_a_unigram_model_that_normalizes_text_gives_the_ids_of_sentencepiece(
    tmp_path: Path, kind: type[PreTrainedConfig], bytes_known: bool
) -> None:
    directory = checkpoint(tmp_path, kind, LLAMA)
    changing = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    processor = train(directory / "tokenizer.model", model_type="unigram", byte_fallback=bytes_known, **changing)
    tokenizer = read(directory)
    for text in (*TEXTS, " blanks before", "ﬁne ½"):
        assert ids(tokenizer, text) == processor.encode(text)
        if bytes_known:
            assert tokenizer.decode(ids(tokenizer, text)) == processor.decode(processor.encode(text))
    assert tokenizer.encode("Hello").ids[0] == processor.bos_id()


def test_a_sentencepiece_model_that_cannot_be_converted_exactly_is_refused(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, LlamaConfig, LLAMA)
    train(directory / "tokenizer.model", model_type="word", byte_fallback=False, hard_vocab_limit=False)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model cannot be converted exactly.*save_pretrained"):
        open_checkpoint(str(directory)).tokenizer()


def save_ranks(path: Path) -> dict[bytes, int]:
    tokens = [bytes([byte]) for byte in range(256)] + [b"He", b"ll", b"Hell", b"Hello", b" w", b" wo", b"12", b"123"]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return ranks


def special(first: int, *tokens: str) -> dict[str, object]:
    decoder = {str(first + index): {"content": token, "special": True} for index, token in enumerate(tokens)}
    return {"bos_token": tokens[0], "eos_token": tokens[1], "added_tokens_decoder": decoder}


def test_tiktokens_format_is_read_as_llama_3s(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, LlamaConfig, special(264, "<|begin_of_text|>", "<|end_of_text|>"))
    for _ in "a file", "another at the same path":
        ranks = save_ranks(directory / "tokenizer.model")
        theirs = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
        tokenizer = read(directory)
        assert [ids(tokenizer, text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
        assert tokenizer.encode("Hello").ids[0] == 264


def test_tiktokens_format_of_another_model_is_refused(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, Qwen2Config)
    save_ranks(directory / "tiktoken.model")
    with pytest.raises(CheckpointError, match=r"tiktoken\.model has tiktoken's format, which is read for Llama 3 only"):
        open_checkpoint(str(directory)).tokenizer()


def test_tiktokens_format_without_special_tokens_is_refused(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, LlamaConfig)
    save_ranks(directory / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"needs a tokenizer_config\.json with added_tokens_decoder"):
        open_checkpoint(str(directory)).tokenizer()


def test_mistrals_tekken_begins_texts_with_the_bos_token(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, MistralConfig)
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    tekken = {
        "config": {"pattern": LLAMA3_PATTERN, "default_vocab_size": 261, "default_num_special_tokens": 5},
        "vocab": [
            {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
            for byte in range(256)
        ],
        "special_tokens": [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)],
    }
    (directory / "tekken.json").write_text(json.dumps(tekken))
    assert read(directory).encode("[INST]Hi").ids == [1, 3, 5 + ord("H"), 5 + ord("i")]
    assert open_checkpoint(str(directory)).tokenizer().special_tokens["eos_token"] == "</s>"


def save_vocabulary(directory: Path) -> None:
    """vocab.json and merges.txt, like GPT-2's and Qwen's."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.model.save(str(directory))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Qwen2Config, None),
        (LlamaConfig, {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>"}),
    ],
)
def test_a_vocabulary_with_merges_gives_the_ids_of_transformers(
    tmp_path: Path, kind: type[PreTrainedConfig], settings: dict[str, str] | None
) -> None:
    directory = checkpoint(tmp_path, kind, settings)
    save_vocabulary(directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    assert [ids(read(directory), text) for text in TEXTS] == [
        theirs.encode(text, add_special_tokens=False) for text in TEXTS
    ]


def test_a_vocabulary_that_would_be_misread_is_refused(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, LlamaConfig, {"tokenizer_class": "LlamaTokenizer"})
    save_vocabulary(directory)
    with pytest.raises(CheckpointError, match="its tokenizer's files are not what LlamaTokenizer reads"):
        open_checkpoint(str(directory)).tokenizer()


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
def test_without_any_tokenizer_file_the_supported_ones_are_named(tmp_path: Path, kind: type[PreTrainedConfig]) -> None:
    directory = checkpoint(tmp_path, kind)
    (directory / "qwen.tiktoken").touch()
    with pytest.raises(CheckpointError, match=r"there is none of tokenizer\.json, tokenizer\.model, .*tekken\.json"):
        open_checkpoint(str(directory)).tokenizer()


def test_a_truncated_tokenizer_json_is_named(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, LlamaConfig)
    (directory / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match=r"no tokenizer can be read from tokenizer\.json"):
        open_checkpoint(str(directory)).tokenizer()


def test_a_git_lfs_pointer_is_recognized(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, LlamaConfig)
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not the file itself .* `git lfs pull`"):
        open_checkpoint(str(directory))
