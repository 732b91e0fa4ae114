"""Tokenizers rebuilt from GGUF metadata give the same tokens as transformers and SentencePiece."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf.constants import TokenType
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CohereTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, convert_gguf_tokenizer

from loraplex_shard.checkpoint import CheckpointError
from loraplex_shard.checkpoint.gguf.pre_tokenizers import WORDS
from loraplex_shard.checkpoint.gguf.tokenizer import read_tokenizer
from tests.shard.test_checkpoint_tokenizers import CORPUS, train

NASTY = (
    "Hello world",
    "  two leading, three trailing   ",
    "a    b     c\t\t\td\n\n\n e\r\n\r\n  f\n    g",
    " ",
    "   ",
    "\t",
    "def f(x):\n\tif x >= 3.14159:\n\t\treturn {'a': [1, 20, 300]}\n\n\n    # done\r\n",
    "Der Fluß fließt; l'été où naïve façade; ¿Qué pasó, señor?",
    "日本語のテキスト、中文文本。한국어 Ελληνικά русский עברית العربية हिन्दी ไทย",
    "🤔👩‍👩‍👧‍👦🇩🇪 e\u0301 a\u0308\u0323 A\u0301\u0302\u0303B \u200b\ufeff\U0001f9ff",
    "it's we'll I'M they'D 2ND IT'S DON'T 'tis rock'n'roll",
    "12345678901234567890 1,234,567.89 3.5e-10 ½ ² Ⅷ ٣٤",
    "!!!???...,,, --- === *** ((())) [[]] {{}} <<>> \\\\ // ''' \"\"\" ``` ~~~ $$$ a/b?c=d&e=f#g",
    "\u3000全角\u3000空白 ab\u00a0cd\u2003ef\u2028gh",
    "camelCaseXMLHttpRequest UPPER lower MiXeD ﬁ Å № ™ 𝒳𝓎𝔷",  # noqa: RUF001
    "\x00\x01\x7f control",
    "x" * 100,
    "<|end|> not <|end |>special<|end|>\n\n<think>a</think>",
)
SPECIAL, ADDED = "<|end|>", "<think>"


@cache
def byte_level_metadata(pre: str) -> dict[str, Any]:
    """A small vocabulary with both kinds of added tokens at its end, as llama.cpp's converter writes it."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=900, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([CORPUS, *NASTY], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens, merges = (
        sorted(model["vocab"], key=model["vocab"].__getitem__),
        [" ".join(each) for each in model["merges"]],
    )
    return metadata("gpt2", tokens, pre=pre, merges=merges)


def metadata(model: str, tokens: list[str], **fields: Any) -> dict[str, Any]:
    types = [*fields.pop("types", [TokenType.NORMAL] * len(tokens)), TokenType.CONTROL, TokenType.USER_DEFINED]
    named = {"model": model, "tokens": [*tokens, SPECIAL, ADDED], "token_type": types, "eos_token_id": len(tokens)}
    return {f"tokenizer.ggml.{name}": value for name, value in (named | fields).items()}


def rebuilt(written: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(read_tokenizer(written).tokenizer_json.decode())


def of_class(kind: type[PreTrainedTokenizerBase], written: dict[str, Any]) -> Tokenizer:
    """The tokenizer that transformers' class for such models builds from the vocabulary."""
    tokens = written["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in written["tokenizer.ggml.merges"]]
    own = kind(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, **dict.fromkeys(NAMES, SPECIAL)
    )
    own.add_tokens([ADDED])
    return own.backend_tokenizer


NAMES = "bos_token", "eos_token", "unk_token", "pad_token"


def assert_same(ours: Tokenizer, theirs: Tokenizer) -> None:
    for text in NASTY:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("pre", "kind"), [("qwen2", Qwen2Tokenizer), ("command-r", CohereTokenizer), ("gpt-2", GPT2Tokenizer)]
)
def test_words_equal_those_of_transformers_class(pre: str, kind: type[PreTrainedTokenizerBase]) -> None:
    written = byte_level_metadata(pre)
    assert_same(rebuilt(written), of_class(kind, written))


@pytest.mark.parametrize("pre", sorted(WORDS.keys() & {n for n in GGUF_PRE_TOKENIZER_SPLITS if "qwen" not in n}))
def test_words_equal_those_of_transformers_gguf_reader(pre: str) -> None:
    written = byte_level_metadata(pre)
    named = {"tokenizer_type": "gpt2", "pre_tokenizer_type": pre}
    named |= {name: written[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type")}
    ours, (theirs, _) = rebuilt(written), convert_gguf_tokenizer("llama", named)
    composed = WORDS[pre].composes  # their reader does not support these
    for text in NASTY:
        if not composed or text.isascii():
            assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("pre", WORDS)
def test_every_text_survives_the_round_trip(pre: str) -> None:
    ours = rebuilt(byte_level_metadata(pre))
    for text in NASTY:
        if not (WORDS[pre].composes and "\u0301" in text):
            assert ours.decode(ours.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def sentencepiece_metadata(
    processor: sentencepiece.SentencePieceProcessor, user_defined: frozenset[str] = frozenset(), **fields: Any
) -> dict[str, Any]:
    ids = range(processor.piece_size())
    tokens = [processor.id_to_piece(id) for id in ids]
    kinds = {
        TokenType.UNKNOWN: processor.is_unknown,
        TokenType.CONTROL: processor.is_control,
        TokenType.UNUSED: processor.is_unused,
        TokenType.BYTE: processor.is_byte,
        TokenType.USER_DEFINED: lambda id: tokens[id] in user_defined,
    }
    types = [next((kind for kind, holds in kinds.items() if holds(id)), TokenType.NORMAL) for id in ids]
    # llama.cpp writes the spaces in such tokens as spaces.
    written = [token.replace("▁", " ") if token in user_defined else token for token in tokens]
    scores = [*(processor.get_score(id) for id in ids), 0.0, 0.0]
    return metadata("llama", written, scores=scores, types=types, **fields)


def same_pieces(ours: Tokenizer, processor: sentencepiece.SentencePieceProcessor) -> None:
    for text in NASTY:
        if "<" not in text and "\x00" not in text:
            ids = ours.encode(text, add_special_tokens=False).ids
            assert ids == processor.encode(text), text
            assert ours.decode(ids) == processor.decode(ids)


def test_pieces_equal_sentencepieces(tmp_path: Path) -> None:
    processor = train(tmp_path / "tokenizer.model")
    ours = rebuilt(sentencepiece_metadata(processor))
    same_pieces(ours, processor)
    assert ours.encode("Hello").ids[0] == processor.bos_id()
    assert ours.encode("<|end|>").ids[1:] == [processor.piece_size()]


def test_no_space_is_added_before_a_text_if_the_file_says_so(tmp_path: Path) -> None:
    processor = train(tmp_path / "tokenizer.model", add_dummy_prefix=False)
    same_pieces(rebuilt(sentencepiece_metadata(processor, add_space_prefix=False)), processor)


def test_gemmas_runs_of_spaces_are_tokens(tmp_path: Path) -> None:
    runs = ["▁" * length for length in range(2, 6)]
    processor = train(
        tmp_path / "tokenizer.model", add_dummy_prefix=False, user_defined_symbols=runs, split_by_whitespace=False
    )
    written = sentencepiece_metadata(processor, frozenset(runs)) | {"general.architecture": "gemma3"}
    ours = rebuilt(written)
    for text in ("a     b", "  two", "   ", "x   y\n     z"):
        assert ours.encode(text, add_special_tokens=False).ids == processor.encode(text)
        assert ours.decode(ours.encode(text, add_special_tokens=False).ids) == text
    assert ours.get_vocab_size() == processor.piece_size() + 2
    reader = {"tokenizer_type": "llama"}
    reader |= {name: written[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")}
    theirs, _ = convert_gguf_tokenizer("gemma3", reader)
    for text in NASTY:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids


def test_phi_3s_special_tokens_include_the_spaces_after_them(tmp_path: Path) -> None:
    processor = train(tmp_path / "tokenizer.model")
    phi = rebuilt(sentencepiece_metadata(processor) | {"general.architecture": "phi3"})
    end = processor.piece_size()
    assert phi.encode("<|end|>\n <|end|>", add_special_tokens=False).ids == [end, end]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, (True, False)), ({"add_bos_token": False}, (False, False)), ({"add_eos_token": True}, (True, True))],
)
def test_the_file_determines_how_texts_begin_and_end(fields: dict[str, bool], expected: tuple[bool, bool]) -> None:
    written = byte_level_metadata("llama-bpe") | {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    written["tokenizer.ggml.bos_token_id"] = written["tokenizer.ggml.eos_token_id"] + 1
    ids = rebuilt(written).encode("Hi").ids
    last = len(written["tokenizer.ggml.tokens"]) - 1
    assert (ids[0] == last, ids[-1] == last - 1) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "kimi-k2"}, r"tokenizer\.ggml\.pre 'kimi-k2' is not served, only .*'llama-bpe'"),
        ({"pre": None}, r"tokenizer\.ggml\.pre is missing: .* newer file"),
        ({"model": "bert"}, r"tokenizer\.ggml\.model 'bert' is not served"),
        ({"merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"merges": ["nowhere found"]}, r"tokenizer\.ggml\.merges does not fit its tokens"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused_by_field(change: dict[str, Any], message: str) -> None:
    written = byte_level_metadata("llama-bpe") | {f"tokenizer.ggml.{name}": value for name, value in change.items()}
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(written)


def test_without_token_types_the_tokens_with_a_purpose_are_special() -> None:
    written = dict(byte_level_metadata("qwen2"))
    del written["tokenizer.ggml.token_type"]
    end = written["tokenizer.ggml.eos_token_id"]
    ours = rebuilt(written)
    assert ours.encode(f"Hi{SPECIAL}").ids[-1] == end
    assert ours.decode([end]) == ""


def test_lists_of_different_lengths_are_refused() -> None:
    written = byte_level_metadata("qwen2") | {"tokenizer.ggml.token_type": [1, 1]}
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.token_type has 2 entries, but there are \d+ tokens"):
        read_tokenizer(written)
