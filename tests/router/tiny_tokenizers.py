"""Tokenizers of the kinds that models have, made here."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from loraplex_router.text.tokenizer import Tokenizer


def byte_tokenizer(*special: str) -> Tokenizer:
    """One token per byte, so that every character beyond ASCII is spread over several; then </s> and others that are
    not shown."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", *special])
    return Tokenizer(tokenizer.to_str().encode())
