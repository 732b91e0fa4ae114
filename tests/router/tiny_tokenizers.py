"""Small tokenizers of the kinds that models have."""

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from loraplex_router.text.tokenizer import Tokenizer


def byte_tokenizer(*special: str) -> Tokenizer:
    """One token per byte, so that characters beyond ASCII have several tokens; then </s> and other special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", *special])
    return Tokenizer(tokenizer.to_str().encode())


WORDS = ["▁", "a", "b", "e", "l", "o", "é", "▁h", "el", "lo", "▁hel", "▁hello", "▁a", "!", "▁▁"]


def sentencepiece_tokenizer(*special: str) -> Tokenizer:
    """Like Llama 2's: words begin with a space, also the first one, whose space is not shown. The rest are bytes."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + WORDS + ["h"]
    merges = [("▁", "h"), ("e", "l"), ("l", "o"), ("▁h", "el"), ("▁hel", "lo"), ("▁", "a"), ("▁", "▁")]
    model = models.BPE({piece: at for at, piece in enumerate(pieces)}, merges, byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", *special])
    return Tokenizer(tokenizer.to_str().encode())


def metaspace_tokenizer(*special: str) -> Tokenizer:
    """Like T5's: words begin with a space, also the first one, whose space is not shown."""
    tokenizer = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in [*WORDS, "h"]], unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>", *special])
    return Tokenizer(tokenizer.to_str().encode())


def wordpiece_tokenizer() -> Tokenizer:
    """Like BERT's: tokens that do not begin a word are marked."""
    pieces = ["[UNK]", "hello", "a", "b", "##b", "##lo", "hel", "é"]
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return Tokenizer(tokenizer.to_str().encode())
