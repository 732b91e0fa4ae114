"""A text that is tokenized in pieces has the same tokens as the whole text, with every kind of tokenizer."""

from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from loraplex_router.text.pieces import IndivisibleError, read_pieces

LLAMA3 = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [
    "the cat sat on the mat, and the dog ate 12345 apples!\n\n  indented    code_here(x, y);"
    " aaaaaaaa 1000 été naïve 中文"
]
WORDS = st.sampled_from(
    [
        "the",
        "cat",
        " ",
        "  ",
        "      ",
        "\n",
        "\n\n",
        "\t",
        "aaaa",
        "12345",
        "été",
        "中文字",
        "😀",
        "<|end|>",
        "<|e",
        "'s",
        "x,y;",
        "▁",
        "e\u0301",
        "-",
    ]
)
TEXTS = st.lists(st.tuples(WORDS, st.integers(1, 20)), min_size=20, max_size=100).map(
    lambda runs: "".join(word * count for word, count in runs)
)


def trained(tokenizer: tokenizers.Tokenizer, trainer: object) -> tokenizers.Tokenizer:
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return tokenizer


def byte_level(split: tokenizers.pre_tokenizers.PreTokenizer | None = None) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=split is not None))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, last]) if split else last
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=400, initial_alphabet=last.alphabet()))


def llama3() -> tokenizers.Tokenizer:
    return byte_level(pre_tokenizers.Split(Regex(LLAMA3), "isolated"))


def gpt2() -> tokenizers.Tokenizer:
    return byte_level()


def smollm() -> tokenizers.Tokenizer:
    return byte_level(pre_tokenizers.Digits(individual_digits=True))


def llama2() -> tokenizers.Tokenizer:
    """A tokenizer without words: SentencePiece's merges over the whole text."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = trained(tokenizer, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    return trained(tokenizer, trainers.UnigramTrainer(vocab_size=80, unk_token="<unk>", special_tokens=["<unk>"]))


def bert() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(tokenizer, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"]))


@pytest.mark.parametrize("make", [gpt2, llama3, smollm, llama2, metaspace, bert])
def test_the_tokens_are_the_same_as_the_whole_texts(make: Callable[[], tokenizers.Tokenizer]):
    tokenizer, cuts = make(), 0

    @given(text=TEXTS)
    @settings(max_examples=60)
    def are_those(text: str) -> None:
        nonlocal cuts
        whole = tokenizer.encode(text, add_special_tokens=False)
        try:
            pieces = list(read_pieces(tokenizer, text, window=256))
        except IndivisibleError:
            return
        cuts += len(pieces) - 1
        places = [(piece.begin + start, piece.begin + stop) for piece in pieces for start, stop in piece.places]
        assert [token for piece in pieces for token in piece.ids] == whole.ids
        assert places == whole.offsets

    are_those()
    assert cuts > 10  # otherwise the test would check little; examples are random


def test_prose_is_divided_at_the_ends_of_windows():
    text = " ".join(CORPUS * 50)
    assert len(list(read_pieces(gpt2(), text, window=512))) > len(text) / 512


def test_a_word_longer_than_the_largest_window_is_refused():
    with pytest.raises(IndivisibleError):
        list(read_pieces(bert(), "a" * 5000, window=256))
